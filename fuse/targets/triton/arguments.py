"""What Triton kernels may take, by name: templates write these names, launches give them values. A kernel takes those that its
body reads (fuse.targets.triton.outline), and is given no others (fuse.targets.triton.function)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap


class Arguments:
    """What comes with a call's operands: of operand i its pointer, p{i}, and of each dimension its size, n{i}_{dim}, and its
    stride, s{i}_{dim}; and the symbols."""

    def __init__(self, spec: AttentionSpec | TileMap) -> None:
        self.pointers = [f"p{i}" for i in range(len(spec.operands))]
        self.symbols = spec.symbols
        self.extents = [f"{x}{i}_{dim}" for i, o in enumerate(spec.operands) for x in "ns" for dim in range(o.rank)]
        self._names = (*self.pointers, *self.symbols, *self.extents)

    def names(self) -> dict[str, Sequence[str]]:
        """As templates list them."""
        return {"pointers": self.pointers, "symbols": self.symbols, "extents": self.extents}

    def of(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> dict[str, Any]:
        """Their values; operands of truth values are bytes."""
        views = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in operands]
        extents = [n for t in views for n in (*t.shape, *t.stride())]
        return dict(zip(self._names, (*views, *sizes, *extents), strict=True))


def strides(name: str, rank: int) -> list[str]:
    """Names of the strides of a tensor that is no operand."""
    return [f"s_{name}_{dim}" for dim in range(rank)]


def strided(name: str, tensor: Tensor) -> dict[str, Any]:
    """A tensor that is no operand, and its strides."""
    return {name: tensor} | dict(zip(strides(name, tensor.dim()), tensor.stride(), strict=True))
