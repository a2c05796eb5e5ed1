"""The map of a mask's tiles as one Triton module."""

from __future__ import annotations

from fuse.ir.expr import walk
from fuse.ir.tile_map import EMPTY, FULL, KEYS, PARTIAL, ROWS, TileMap
from fuse.targets.triton.arguments import Arguments
from fuse.targets.triton.outline import rendered
from fuse.targets.triton.write import Block, TritonWriter

TILE_MAP = "fuse_tile_map"


def render_tile_map_triton(spec: TileMap) -> str:
    """The kernel TILE_MAP."""
    per_batch, per_entry = Block(), Block()
    real = "tl.float64" if any(node.dtype == "float64" for node in walk(spec.predicate)) else "tl.float32"
    writer = TritonWriter(lambda axes: per_entry if axes & {"q", "k"} else per_batch, real, [0])
    lines = (f"which tiles hold an entry where {spec.predicate}", f"spec  {spec.to_json()}")
    context = Arguments(spec).names() | {
        "entry": TILE_MAP, "batch": spec.batch,
        "predicate": writer.value(spec.predicate), "per_batch": per_batch, "per_entry": per_entry, "map_rows": ROWS,
        "map_keys": KEYS, "empty": EMPTY, "partial": PARTIAL, "full": FULL,
    }  # fmt: skip
    return rendered("tile_map", spec, lines, context)
