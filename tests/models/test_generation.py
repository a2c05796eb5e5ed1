"""Text token by token: the keys of earlier tokens come from a cache that grows, or that has its final length from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

import fuse
from models import MODELS, decoders, padded, tokens  # noqa: F401  (it registers the models)
from models.measure import Wide, draws, errors_of, pooled, prepared, widened

PROMPT, LENGTH = 37, 45  # tokens given at once, and in the end
SETTLED = 40  # from here on, nothing compiles


def dynamic(network: nn.Module) -> Cache:
    return DynamicCache(config=network.config)


def static(network: nn.Module) -> Cache:
    return StaticCache(config=network.config, max_cache_len=LENGTH + 6)


def decode(run: Callable[..., Any], cache: Cache, side: str | None) -> tuple[list[Tensor], int]:
    """The hidden states of each step, and how many sites had been compiled when things should have settled."""
    ids, mask = tokens(LENGTH), padded(side or "left", LENGTH)
    states, settled = [], 0
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        given = {} if side is None else {"attention_mask": mask[:, :stop].clone()}
        given["input_ids"] = ids[:, start:stop].clone()  # a slice has strides, which torch would guard on
        with torch.no_grad():
            states.append(run(past_key_values=cache, use_cache=True, **given).last_hidden_state)
        settled = len(fuse.report().sites) if stop == SETTLED else settled
    return states, settled


@pytest.mark.parametrize(
    ("name", "attention", "side", "make_cache", "declined"),
    [
        ("Llama padded", "sdpa", None, dynamic, set()),
        ("GPT-2", "eager", "left", dynamic, set()),
        ("Gemma2", "eager", None, dynamic, set()),
        ("Llama padded", "sdpa", None, static, set()),
        ("GPT-2", "eager", "left", static, set()),
    ],
)
def test_decoding_with_a_cache_settles_and_stays_right(
    name: str, attention: str, side: str | None, make_cache: Callable[[nn.Module], Cache], declined: set[str]
) -> None:
    """``declined`` names what is not fused yet: a window that slides, and a cache that counts its length in place."""
    network, _ = prepared(*MODELS[name].build(attention), torch.float32)
    compiled = torch.compile(network, backend="fuse", options={"target": "cpp", "inner": "aot_eager"})
    errors, settled = [], []
    for _ in draws(network):
        states, count = decode(compiled, make_cache(network), side)
        eager, _ = decode(network, make_cache(network), side)
        with Wide():
            truth, _ = decode(widened(network), make_cache(network), side)
        errors.append(errors_of(states, eager, truth))
        settled.append(count)
    sites = fuse.report().sites
    assert {type(s.reason).__name__ for s in sites if not s.fused} == declined
    assert len(sites) == settled[0], "a graph was compiled for a later step"
    pooled(errors).assert_no_farther()
