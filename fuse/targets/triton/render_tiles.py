"""Which tiles a block visits, as one Triton module, for masks that have more than bounds: the tiles of keys that a block of
queries sees or, transposed, the tiles of queries that see a block of keys."""

from __future__ import annotations

from dataclasses import dataclass

from fuse.ir import tile_map
from fuse.ir.spec import AttentionSpec
from fuse.kernel.forward import forward_program
from fuse.targets.triton.arguments import Arguments
from fuse.targets.triton.outline import rendered
from fuse.targets.triton.ranges import TritonRanges
from fuse.targets.triton.render import TritonSource, header, mask_axes
from fuse.targets.triton.write import Block, TritonWriter, depends

TILES = "fuse_attention_tiles"


@dataclass(frozen=True)
class Side:
    """Names of one side of a tile, its positions ``at``, and how many of them a cell of a map has."""

    at: str
    length: str
    size: str
    cell: int


_SIDES = {"q": Side("q", "q_len", "BM", tile_map.ROWS), "k": Side("k", "kv_len", "BN", tile_map.KEYS)}


def is_listed(spec: AttentionSpec, owner: str) -> bool:
    """Whether what owns queries ("q") or keys ("k") has lists. What a mask asks of keys alone, their owner asks itself."""
    residual = forward_program(spec).residual
    return residual is not None and (owner == "q" or "q" in depends(residual))


def render_tiles(spec: AttentionSpec, owner: str) -> str:
    """The kernel TILES_owner."""
    own, other = _SIDES[owner], _SIDES["k" if owner == "q" else "q"]
    source, visited = TritonSource(spec, frozenset(owner)), Block()
    bounds = [source.bound(b) | {"name": b.name} for b in source.computed.bounds]
    residual = source.computed.residual
    assert residual is not None
    cells, result = "", ""
    if spec.mask is not None and spec.mask.tiles is not None:
        place, names = lambda axes: visited if axes & {"q", "k"} else source.per_batch, {"q": "cell_q", "k": "cell_k"}
        cells = TritonWriter(place, source.real, source.count, names=names).value(spec.mask.tiles)
    else:
        result = TritonRanges(source.writer(visited), owner, source.per_row, visited, source.count).range(residual)
    context = Arguments(spec).names() | {
        "entry": f"{TILES}_{owner}", "own": own, "other": other, "bounds": bounds, "mask_axes": mask_axes(spec),
        "per_batch": source.per_batch, "per_owned": source.per_row, "visited": visited,
        "cells": cells, "result": result, "empty": tile_map.EMPTY, "full_cell": tile_map.FULL, "map_rows": tile_map.ROWS,
        "map_keys": tile_map.KEYS,
    }  # fmt: skip
    return rendered("tiles", spec, header(spec, "tiles that are visited"), context)
