"""The map of a mask's tiles as one Triton module."""

from __future__ import annotations

from fuse.ir.expr import walk
from fuse.ir.tile_map import EMPTY, FULL, KEYS, PARTIAL, ROWS, TileMap
from fuse.kernel.source import environment
from fuse.targets.triton.render import argument_names
from fuse.targets.triton.write import Block, TritonWriter

TILE_MAP = "fuse_tile_map"


def render_tile_map_triton(spec: TileMap) -> str:
    """The kernel TILE_MAP; its arguments are those of ``fuse.targets.triton.launch_tile_map``."""
    batch_index, entries = Block(), Block()
    real = "tl.float64" if any(node.dtype == "float64" for node in walk(spec.predicate)) else "tl.float32"
    writer = TritonWriter(lambda axes: entries if axes & {"q", "k"} else batch_index, real, [0])
    lines = (f"which tiles hold an entry where {spec.predicate}", f"spec  {spec.to_json()}")
    context = argument_names(spec) | {
        "header": "\n".join(f"# {line}" for line in lines), "entry": TILE_MAP, "batch": spec.batch,
        "predicate": writer.value(spec.predicate), "batch_index": batch_index, "entries": entries, "map_rows": ROWS,
        "map_keys": KEYS, "empty": EMPTY, "partial": PARTIAL, "full": FULL,
    }  # fmt: skip
    return environment().get_template("triton/tile_map.py.jinja").render(context)
