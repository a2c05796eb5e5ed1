"""Tensor parallelism: parameters are DTensors, attention runs on each rank's heads as plain tensors."""

from __future__ import annotations

import copy

import torch
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import fuse
from models.decoders import llama_like

RANKS = 2
PLAN = {f"self_attn.{n}": ColwiseParallel() for n in ("q_proj", "k_proj", "v_proj")} | {"self_attn.o_proj": RowwiseParallel()}


def train_one_step() -> tuple[int, int, float, float]:
    """Steps of the sharded, compiled model and of the whole one: sites, fused ones, differences of losses and of gradients."""
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**llama_like("eager", vocab_size=64, num_hidden_layers=1)))
    sharded = copy.deepcopy(whole)
    for layer in sharded.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), PLAN)
    ids = torch.randint(0, 64, (2, 48))
    losses = [
        whole(ids, labels=ids).loss,
        torch.compile(sharded, backend="fuse", options={"inner": "aot_eager"})(ids, labels=ids).loss,
    ]
    for loss in losses:
        loss.backward()
    gradients = [[g.full_tensor() if isinstance(g := p.grad, DTensor) else g for p in m.parameters()] for m in (whole, sharded)]
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*gradients, strict=True))
    report = fuse.report()
    return len(report.sites), report.fused, float((losses[0] - losses[1]).abs()), worst


def test_every_rank_of_a_tensor_parallel_llama_fuses_its_heads() -> None:
    for sites, fused, loss, gradient in run_ranks(train_one_step, RANKS):
        assert (sites, fused) == (1, 1)
        assert loss < 1e-5
        assert gradient < 1e-4
