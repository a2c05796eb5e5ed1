"""The map of a mask's tiles as one C++ source: lanes are keys, rows of cells are shared by the threads."""

from __future__ import annotations

from fuse import tiles
from fuse.codegen.cpp import MAX_LENGTH, Body
from fuse.codegen.keys import key_program
from fuse.codegen.render import ENTRY, environment, origin
from fuse.expr import apply, const
from fuse.planner import Plan
from fuse.tiles import TileMap


def render_tile_map(spec: TileMap, plan: Plan) -> str:
    """One self-contained C++ source with the entry point ``ENTRY(const int64_t* arguments)``."""
    site = Body(prefix="s.")
    shown = apply("where", spec.predicate, const(1.0, "float32"), const(0.0, "float32"), dtype="float32")
    lines = [f"which tiles hold an entry where {spec.predicate}", f"spec  {spec.to_json()}", *origin(plan)]
    context = {
        "header": "\n".join(f"// {line}" for line in lines), "plan": plan, "entry": ENTRY, "max_length": MAX_LENGTH,
        "batch": spec.batch, "symbols": spec.symbols, "batch_sizes": [f"B{i}" for i in range(spec.batch)],
        "ranks": [o.rank for o in spec.operands], "key_programs": [key_program(site, [0], "Visible", "1 where seen.", shown)],
        "site": site, "rows": tiles.ROWS, "keys": tiles.KEYS,
        "empty": tiles.EMPTY, "partial": tiles.PARTIAL, "full": tiles.FULL,
    }  # fmt: skip
    return environment().get_template("cpp/tile_map.cpp.jinja").render(context)
