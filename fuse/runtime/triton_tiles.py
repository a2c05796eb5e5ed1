"""The launch of what lists the tiles that a forward kernel visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuse.codegen.render import residual_of
from fuse.codegen.render_tiles import TILES, render_tiles
from fuse.codegen.render_triton import mask_axes
from fuse.planner_triton import TritonPlan
from fuse.runtime.cache import write_once
from fuse.runtime.triton_launch import Function
from fuse.runtime.triton_module import load
from fuse.spec import AttentionSpec

# Tiles of keys up to which all are visited: a list costs a launch.
_FEW = 6
# Tiles that are classified together.
_MANY = 32


class TritonTiles:
    """What a forward kernel visits where its mask has more than bounds: lists of tiles, or all of them in short calls."""

    def __init__(self, spec: AttentionSpec, few: int = _FEW) -> None:
        self._few = few
        self._batch, self._axes, self._needed = spec.batch, mask_axes(spec), residual_of(spec) is not None
        if self._needed:
            self.source = write_once("triton", "tiles", ".py", render_tiles(spec))
            self.function = Function(getattr(load(self.source), TILES))

    def of(
        self, operands: Sequence[Any], sizes: Sequence[int], plan: TritonPlan, out: Tensor
    ) -> tuple[tuple[Tensor, ...], bool]:
        """What the forward kernel takes beside its own, and whether that are lists; else it may be any tensor.

        operands  the operands, sizes, and the operands' sizes and strides
        """
        q_len, kv_len = sizes[self._batch : self._batch + 2]
        count = -(-kv_len // plan.block_k)
        if not self._needed or count <= self._few:
            return (out, out) if self._needed else (), False
        programs = -(-q_len // plan.block_q) * math.prod(sizes[i] for i in self._axes)
        tiles = torch.empty(programs, count, dtype=torch.int32, device=out.device)
        counts = torch.empty(programs, 2, dtype=torch.int32, device=out.device)
        self.function[(programs,)](tiles, counts, *operands, BM=plan.block_q, BN=plan.block_k, MANY=_MANY, num_warps=4)
        return (tiles, counts), True
