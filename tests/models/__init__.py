"""Unmodified transformers models, made small from their own configurations, and what fuse must make of each.

A model is a function from the name of an attention implementation to a model and its inputs, registered with the number of
attention sites its architecture has: one for each attention layer, self and cross. It has a second layer only where that is
another one, or reads what the first has made; Llama and BERT have two that are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Build = Callable[[str], tuple[nn.Module, Inputs]]

# Lengths and head counts that differ from each other and from every tile; one head size, so that models share kernels.
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 77, 6, 2, 16
HIDDEN, INNER, VOCABULARY, POSITIONS = HEADS * HEAD_DIM, 112, 101, 128

NO_MASK = ""
PADDING = "attention_mask[k] != 0"
CAUSAL = "k <= q"
CAUSAL_PADDING = f"{CAUSAL} and {PADDING}"


@dataclass(frozen=True)
class Model:
    """``sites``: attention layers, all of which must fuse; ``masks``: what is recovered in them, in order, no repeats.

    An entry of ``masks`` is the predicate that is true where a key is visible, or "" for a layer without a mask.
    """

    name: str
    build: Build
    sites: int
    masks: tuple[str, ...]
    implementations: tuple[str, ...]


MODELS: dict[str, Model] = {}
EAGER_ONLY = ("eager",)


def model(
    name: str, *, sites: int, masks: tuple[str, ...], implementations: tuple[str, ...] = ("eager", "sdpa")
) -> Callable[[Build], Build]:
    """Registers a model."""

    def register(build: Build) -> Build:
        assert name not in MODELS, name
        MODELS[name] = Model(name, build, sites, masks, implementations)
        return build

    return register


def tokens(length: int = LENGTH, *, seed: int = 0) -> Tensor:
    """Ids from 3 on: the first three are special in many models."""
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, length: int = LENGTH) -> Tensor:
    """A padding mask whose last text is shorter by 9 tokens."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, slice(-9, None) if side == "right" else slice(0, 9)] = 0
    return mask


def text(side: str | None = None, length: int = LENGTH, **more: Any) -> Inputs:
    """Token ids, padded on the left or on the right, or not at all."""
    return {"input_ids": tokens(length), **({} if side is None else {"attention_mask": padded(side, length)}), **more}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
