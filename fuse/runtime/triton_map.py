"""The launch of what computes a map of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fuse.codegen.tile_map_triton import TILE_MAP, render_tile_map_triton
from fuse.runs import Runs
from fuse.runtime.cache import write_once
from fuse.runtime.triton_launch import Function
from fuse.runtime.triton_module import load
from fuse.tiles import TileMap

# Cells of a program.
_MANY = 8


class TritonTileMap:
    """A loaded kernel of a TileMap; called with its operands and the values of its symbols."""

    def __init__(self, spec: TileMap) -> None:
        self._spec = spec
        self.source = write_once("triton", "tile_map", ".py", render_tile_map_triton(spec))
        self.runs = Runs("kernel", self.source)
        self.function = Function(getattr(load(self.source), TILE_MAP))

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        out = torch.empty(self._spec.out_shape(sizes), dtype=torch.uint8, device=operands[0].device)
        if out.numel():
            views = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in operands]
            extents = [n for t in views for n in (*t.shape, *t.stride())]
            *lines, cells = out.shape
            grid = (math.prod(lines) * -(-cells // _MANY),)
            self.function[grid](out, *views, *sizes, *extents, MANY=_MANY, num_warps=4)
        return out
