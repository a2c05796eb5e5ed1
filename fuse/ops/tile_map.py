"""``fuse::tile_map``: the map of a mask's tiles as a node of the graph, which layers share (see fuse.ir.tile_map)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fuse.ir.spec import IntLike
from fuse.ir.tile_map import TileMap
from fuse.memoize import memoize
from fuse.ops.batching import tile_map_rule
from fuse.ops.buffer_cache import cached
from fuse.torch_private import below_autograd

# keep: the operands are buffers, so that the map is good until one of them changes
SCHEMA = "tile_map(Tensor[] operands, SymInt[] sizes, str spec, str target, bool keep) -> Tensor"

_library: Any = torch.library.Library("fuse", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


@cache
def _parsed(text: str) -> TileMap:
    return TileMap.from_json(text)


@memoize
def _kernel(text: str, target: str) -> Callable[[Sequence[Tensor], Sequence[int]], Tensor]:
    from fuse import targets  # builds kernels: not needed to trace or to save a graph

    return targets.map_kernel(_parsed(text), target)


def _tile_map(operands: list[Tensor], sizes: list[int], spec: str, target: str, keep: bool) -> Tensor:
    kernel = _kernel(spec, target)
    return cached(operands, (spec, target, *sizes), lambda: kernel(operands, sizes)) if keep else kernel(operands, sizes)


def _fake(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str, keep: bool) -> Tensor:
    return torch.empty(_parsed(spec).out_shape(sizes), dtype=torch.uint8, device=operands[0].device)


def _autograd(operands: list[Tensor], sizes: list[int], spec: str, target: str, keep: bool) -> Tensor:
    """Classes have no gradient."""
    with below_autograd():
        result: Tensor = torch.ops.fuse.tile_map.default(operands, sizes, spec, target, keep)
        return result


_library.impl("tile_map", _tile_map, "CompositeExplicitAutograd")
_library.impl("tile_map", _autograd, "Autograd")
torch.library.register_fake("fuse::tile_map", _fake, lib=_library)
torch.library.register_vmap("fuse::tile_map", tile_map_rule, lib=_library)
