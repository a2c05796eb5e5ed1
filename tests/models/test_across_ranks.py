"""transformers' models with their sequence on two ranks: results and gradients are those of one, whatever way keys travel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from ranks import run_ranks
from torch import Tensor, nn

import fuse
from models import BATCH, VOCABULARY, tokens
from models.decoders import llama_like
from models.encoders import bert_like

RANKS, LENGTH, LAYERS = 2, 48, 2
WAYS = ((False, "gather"), (True, "ring"))  # balanced, how keys travel
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "dropout_rate": 0.0}


@dataclass(frozen=True)
class Case:
    """``padded``: the batch says which tokens are padding."""

    build: Callable[[], nn.Module]
    padded: bool = False
    dtype: torch.dtype = torch.float32


def llama() -> nn.Module:
    return hf.LlamaModel(hf.LlamaConfig(**llama_like("sdpa", num_hidden_layers=LAYERS, use_cache=False)))


def t5_decoder() -> nn.Module:
    decoder: nn.Module = hf.T5Model(hf.T5Config(**T5)).decoder
    return decoder


def deberta() -> nn.Module:
    given = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True}
    return hf.DebertaV2Model(hf.DebertaV2Config(**bert_like("eager", num_hidden_layers=LAYERS, **given)))


CASES = {
    "T5's encoder": Case(lambda: hf.T5EncoderModel(hf.T5Config(**T5))),
    "T5's decoder": Case(t5_decoder),
    "T5's encoder, written out": Case(lambda: hf.T5EncoderModel._from_config(hf.T5Config(**T5), attn_implementation="eager")),
    "MPNet": Case(lambda: hf.MPNetModel(hf.MPNetConfig(**bert_like("eager", num_hidden_layers=LAYERS))), padded=True),
    "DeBERTa-v2": Case(deberta, padded=True),
    "Llama in bfloat16": Case(llama, padded=True, dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Outcome:
    """Of ranks, or of one in the same dtype, from one that runs eagerly in float32: results, and gradients as a share of the
    largest of all; the table's of distances as a share of its own."""

    result: float
    gradients: float
    table: float


@dataclass(frozen=True)
class Run:
    out: Tensor
    gradients: dict[str, Tensor]


def batch(case: Case, model: nn.Module) -> dict[str, Tensor]:
    given = {"input_ids": tokens(LENGTH)}
    if case.padded:
        given["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
        given["attention_mask"][-1, -9:] = 0
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.arange(LENGTH).expand(BATCH, -1)
    return given


def run(call: Callable[..., Any], model: nn.Module, given: dict[str, Tensor], weights: Tensor) -> Run:
    model.zero_grad()
    out = call(**given).last_hidden_state
    (out * weights.to(out.dtype)).sum().backward()
    return Run(out.detach(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None})


def outcome(found: Run, exact: Run, weights: Tensor) -> Outcome:
    """Where ``weights`` are not zero: what padding has is nobody's."""
    result = float(((found.out.float() - exact.out) * (weights != 0)).abs().max())
    largest = max(float(x.abs().max()) for x in exact.gradients.values())
    off = {n: float((x - exact.gradients[n]).abs().max()) for n, x in found.gradients.items()}
    tables = [off[n] / float(exact.gradients[n].abs().max()) for n in off if "relative_attention_bias" in n]
    return Outcome(result, max(off.values()) / largest, max(tables, default=0.0))


def outcomes(name: str) -> dict[str, Outcome | tuple[int, int]]:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    given = batch(case, model)
    weights = (
        torch.randn(BATCH, LENGTH, model.config.hidden_size) * given.get("attention_mask", torch.ones(BATCH, LENGTH))[..., None]
    )
    exact = run(model, model, given, weights)
    model.to(case.dtype)
    found: dict[str, Any] = {"one": outcome(run(model, model, given, weights), exact, weights)}
    for balanced, way in WAYS:
        torch._dynamo.reset()
        fuse.reset()
        across = fuse.ContextParallel(dist.group.WORLD, balanced=balanced, way=way)
        compiled = torch.compile(model, backend="fuse", options={"inner": "eager", "context_parallel": across})
        shard = fuse.shard_sequence(given, across)
        shard = {n: x for n, x in shard.items() if n in given}
        own = run(compiled, model, shard, fuse.shard_sequence(weights, across))
        for x in own.gradients.values():
            dist.all_reduce(x)
        found[way] = outcome(Run(fuse.gather_sequence(own.out, across), own.gradients), exact, weights)
        found[f"{way}, sites"] = len(fuse.report().sites), fuse.report().fused
    return found


def all_outcomes() -> dict[str, dict[str, Any]]:
    return {name: outcomes(name) for name in CASES}


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(all_outcomes, RANKS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["gather", "ring"])
def test_a_model_over_ranks_is_that_of_one(name: str, way: str, of_ranks: list[dict[str, dict[str, Any]]]) -> None:
    """In bfloat16 it is as far from float32 as one rank's is, or a little more."""
    for rank in of_ranks:
        found, one = rank[name][way], rank[name]["one"]
        assert rank[name][f"{way}, sites"] == (LAYERS, LAYERS)
        assert found.result < 5e-6 + 1.5 * one.result, (found, one)
        assert max(found.gradients, found.table) < 2e-6 + 1.5 * max(one.gradients, one.table), (found, one)
