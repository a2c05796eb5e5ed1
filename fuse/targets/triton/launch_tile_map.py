"""The launch of what computes a map of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fuse.ir.tile_map import TileMap
from fuse.targets.triton.arguments import Arguments
from fuse.targets.triton.module import Module, made
from fuse.targets.triton.render_tile_map import TILE_MAP, render_tile_map_triton

# Cells of a program.
_MANY = 8


class TritonTileMap:
    """A loaded kernel of a TileMap; called with its operands and the values of its symbols. ``module`` as of TritonKernel."""

    def __init__(self, spec: TileMap, module: Module | None = None) -> None:
        self._spec, self._arguments = spec, Arguments(spec)
        module = module or made("tile_map", render_tile_map_triton(spec))
        self.source, self.runs, self.function = module.source, module.runs, module.function(TILE_MAP)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        out = torch.empty(self._spec.out_shape(sizes), dtype=torch.uint8, device=operands[0].device)
        if out.numel():
            *lines, cells = out.shape
            grid = (math.prod(lines) * -(-cells // _MANY),)
            self.function[grid]({"out": out} | self._arguments.of(operands, sizes), MANY=_MANY, num_warps=4)
        return out
