"""Training on several ranks as torch and transformers have it: every rank fuses its sites, a step is that of one rank, eagerly.

A case shards a Llama, compiles it and trains one step. Cases of one ``group`` run in the same processes: starting those takes
longer than a case.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fuse
from models.decoders import llama_like

RANKS = {"data": 2, "model": 2, "both": 4}
LAYERS = 2
ONCE = 1  # graph of all layers, where each layer is one: their code is the same
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """Of a whole batch: its loss, and gradients by the names of parameters, those that lie on this rank."""

    loss: float
    gradients: Gradients


@dataclass(frozen=True)
class Case:
    """``sites``: of one process that compiles the same graphs; ``error``: of gradients, relative to the largest of a tensor."""

    group: str
    sites: int
    run: Callable[[], Step]
    error: float = 1e-5


CASES: dict[str, Case] = {}
# Where torch 2.11 compiles other graphs: one without gradients tells stages the shapes; layers of one class share theirs.
SITES_OF_2_11 = {
    "stages of a pipeline, 1F1B": 2,
    "stages of a pipeline, GPipe, with checkpoints": 2,
    "FSDP2 per layer and tensor parallel, with checkpoints": ONCE,
}


def case(name: str, group: str, sites: int, error: float = 1e-5) -> Callable[[Callable[[], Step]], Callable[[], Step]]:
    def register(run: Callable[[], Step]) -> Callable[[], Step]:
        CASES[name] = Case(group, sites, run, error)
        return run

    return register


# ---------------------------------------------------------------------------------------------------- models and steps


def llama(attention: str = "eager") -> LlamaForCausalLM:
    """The same on every rank, with grouped queries; a layer has more than the megabyte of DDP's first bucket."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": LAYERS, "intermediate_size": 1024}
    return LlamaForCausalLM(LlamaConfig(**llama_like(attention, use_cache=False, **sizes)))


def texts() -> Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, inner: str = "aot_eager") -> Any:
    return torch.compile(model, backend="fuse", options={"inner": inner})


def with_checkpoints(model: nn.Module) -> None:
    """Each layer is computed again in the backward pass, by torch's wrapper."""
    apply_activation_checkpointing(model, checkpoint_wrapper, lambda module: isinstance(module, LlamaDecoderLayer))


def checkpointing_itself(model: LlamaForCausalLM) -> None:
    """The same by transformers, which calls ``torch.utils.checkpoint``."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> Gradients:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name.replace("_checkpoint_wrapped_module.", "")] = whole(parameter.grad).float()
    return found


def step(call: Any, model: nn.Module, batch: Tensor) -> Step:
    """``call`` runs ``model``; ranks that see different texts have as many."""
    loss = call(batch, labels=batch).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return Step(float(mean) / dist.get_world_size(), gradients(model))


def own_texts(mesh: DeviceMesh | None = None) -> Tensor:
    rank, count = (dist.get_rank(), dist.get_world_size()) if mesh is None else (mesh.get_local_rank(), mesh.size())
    return texts().chunk(count)[rank]


# -------------------------------------------------------------------------------------------------------- data parallel


@case("DDP of a compiled model, with checkpoints", "data", LAYERS)
def ddp() -> Step:
    model = llama("sdpa")
    with_checkpoints(model)
    return step(DistributedDataParallel(compiled(model)), model, own_texts())


@case("DDP, compiled, whose graph is cut where a bucket of gradients ends", "data", LAYERS)
def ddp_in_buckets() -> Step:
    model = llama()
    return step(compiled(DistributedDataParallel(model, bucket_cap_mb=1.1)), model, own_texts())


def fsdp(model: nn.Module, mesh: DeviceMesh | None = None, layers: bool = True, **how: Any) -> None:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*(model.model.layers if layers else ()), model):
        fully_shard(module, mesh=mesh, **how)


@case("FSDP2 of the whole model, checkpointing itself", "data", LAYERS)
def fsdp_whole() -> Step:
    model = llama()
    checkpointing_itself(model)
    fsdp(model, layers=False)
    return step(compiled(model), model, own_texts())


@case("FSDP2 per layer, with checkpoints", "data", ONCE)
def fsdp_layers() -> Step:
    model = llama()
    with_checkpoints(model)
    fsdp(model, reshard_after_forward=True)
    return step(compiled(model), model, own_texts())


@case("FSDP2 per layer, not resharded, by Inductor", "data", ONCE)
def fsdp_kept() -> Step:
    model = llama("sdpa")
    fsdp(model, reshard_after_forward=False)
    return step(compiled(model, "inductor"), model, own_texts())


@case("FSDP2 per layer, each compiled and checkpointing itself", "data", ONCE)
def fsdp_compiled_layers() -> Step:
    model = llama()
    checkpointing_itself(model)
    fsdp(model)
    for layer in model.model.layers:
        layer.compile(backend="fuse", options={"inner": "aot_eager"})
    return step(model, model, own_texts())


@case("FSDP2 per layer in bfloat16", "data", ONCE, error=3e-2)
def fsdp_mixed() -> Step:
    model = llama()
    fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    return step(compiled(model), model, own_texts())


# ------------------------------------------------------------------------------------------------------ tensor parallel


def tensor_plan() -> dict[str, Any]:
    wide = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    narrow = ("self_attn.o_proj", "mlp.down_proj")
    return {**dict.fromkeys(wide, ColwiseParallel()), **dict.fromkeys(narrow, RowwiseParallel())}


def sequence_plan() -> dict[str, Any]:
    """Between attention and perceptrons each rank has a part of the sequence."""
    part, all_of_it = Shard(1), Replicate()
    gathered = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": part}, desired_input_kwarg_layouts={"hidden_states": all_of_it}
    )
    return tensor_plan() | {
        "input_layernorm": SequenceParallel(use_local_output=True),
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "self_attn": gathered,
        "mlp": PrepareModuleInput(input_layouts=part, desired_input_layouts=all_of_it),
        "self_attn.o_proj": RowwiseParallel(output_layouts=part),
        "mlp.down_proj": RowwiseParallel(output_layouts=part),
    }


@case("tensor parallel, with checkpoints", "model", LAYERS)
def tensor_parallel() -> Step:
    model, mesh = llama(), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, tensor_plan())
    with_checkpoints(model)
    return step(compiled(model), model, texts())


@case("sequence parallel", "model", LAYERS)
def sequence_parallel() -> Step:
    model, mesh = llama("sdpa"), init_device_mesh("cpu", (2,))
    ends = {
        "model.layers.0": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True),
        "model.norm": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    for layer in model.model.layers:
        parallelize_module(layer, mesh, sequence_plan())
    return step(compiled(model), model, texts())


@case('tp_plan="auto" of transformers, checkpointing itself', "model", LAYERS)
def tensor_parallel_by_transformers() -> Step:
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        if dist.get_rank() == 0:
            llama().save_pretrained(own)
        dist.barrier()
        model = LlamaForCausalLM.from_pretrained(folders[0], tp_plan="auto", attn_implementation="eager")
        dist.barrier()
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    checkpointing_itself(model)
    return step(compiled(model), model, texts())


@case("FSDP2 per layer and tensor parallel, with checkpoints", "both", LAYERS)
def fsdp_and_tensor_parallel() -> Step:
    model, mesh = llama(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tensor"], tensor_plan())
    with_checkpoints(model)
    fsdp(model, mesh["data"])
    return step(compiled(model), model, own_texts(mesh["data"]))


# ------------------------------------------------------------------------------------------------------ pipeline parallel


class Stage(nn.Module):
    """One layer of ``of``, with what stands before the first or behind the last."""

    def __init__(self, of: LlamaForCausalLM, number: int) -> None:
        super().__init__()
        self.takes = "inputs_embeds" if number else "input_ids"
        self.model, self.head = of.model, of.lm_head
        self.model.layers = self.model.layers[number : number + 1]
        if number:
            self.model.embed_tokens = None
        if number < LAYERS - 1:
            self.model.norm = self.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.model(**{self.takes: x}).last_hidden_state)
        return logits


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def pipeline(schedule: Any, prepare: Callable[[LlamaForCausalLM], None]) -> Step:
    model, rank, losses = llama(), dist.get_rank(), list[Tensor]()
    names = {parameter: name for name, parameter in model.named_parameters()}
    prepare(model)
    module = Stage(model, rank)
    stage = PipelineStage(compiled(module, "eager"), rank, LAYERS, torch.device("cpu"))
    given = {"target": texts(), "losses": losses} if rank else {}
    schedule(stage, n_microbatches=2, loss_fn=next_token).step(*([] if rank else [texts()]), **given)
    loss = torch.stack(losses).mean() if losses else torch.zeros(())
    dist.broadcast(loss, src=LAYERS - 1)
    return Step(float(loss), {names[p]: p.grad for p in module.parameters() if p.grad is not None})


case("stages of a pipeline, 1F1B", "model", 1)(functools.partial(pipeline, Schedule1F1B, lambda model: None))
case("stages of a pipeline, GPipe, with checkpoints", "model", 1)(functools.partial(pipeline, ScheduleGPipe, with_checkpoints))


# ------------------------------------------------------------------------------------------------------------- on each rank


@dataclass(frozen=True)
class Found:
    """Of a case on a rank: sites, and how far loss and gradients are from one rank's, eagerly."""

    case: str
    sites: int
    fused: int
    loss: float
    gradients: float


def run_group(group: str) -> list[Found]:
    alone = step(model := llama(), model, texts())
    return [found(name, case.run, alone) for name, case in CASES.items() if case.group == group]


def found(name: str, run: Callable[[], Step], alone: Step) -> Found:
    torch._dynamo.reset()
    fuse.reset()
    try:
        here = run()
    except Exception as e:
        raise AssertionError(name) from e
    far = [float((g - alone.gradients[n]).abs().max() / alone.gradients[n].abs().max()) for n, g in here.gradients.items()]
    report = fuse.report()
    return Found(name, len(report.sites), report.fused, abs(here.loss / alone.loss - 1), max(far))


@pytest.mark.parametrize("group", RANKS)
def test_every_rank_fuses_its_sites_and_the_step_is_that_of_one_rank(group: str) -> None:
    for rank, all_found in enumerate(run_ranks(run_group, RANKS[group], group, limit=600)):
        for f in all_found:
            asked = CASES[f.case]
            sites = SITES_OF_2_11.get(f.case, asked.sites) if torch.__version__.startswith("2.11.") else asked.sites
            assert (f.sites, f.fused) == (sites, sites), (rank, f)
            assert f.loss < asked.error, (rank, f)
            assert f.gradients < asked.error, (rank, f)
