"""The map of a mask's tiles as one C++ source: lanes are keys, rows of cells are shared by the threads."""

from __future__ import annotations

from dataclasses import dataclass

from fuse.ir.expr import Apply, Expr, Load, apply, axes, const, index
from fuse.ir.interval import MAX_LENGTH
from fuse.ir.tile_map import EMPTY, FULL, KEYS, PARTIAL, ROWS, TileMap
from fuse.kernel.example import example
from fuse.kernel.source import ENTRY, environment
from fuse.targets.cpp.outline import finished
from fuse.targets.cpp.plan import Plan
from fuse.targets.cpp.render import origin
from fuse.targets.cpp.write import C_TYPES, Body, scalar_function
from fuse.targets.cpp.write_keys import KeyRuns, key_program


@dataclass(frozen=True)
class Bytes:
    """A predicate that is a bool tensor, or its negation, whose last coordinate is the key."""

    operand: int
    last: int
    offset: str
    negated: bool


def _bytes(predicate: Expr, count: list[int]) -> Bytes | None:
    negated = isinstance(predicate, Apply) and predicate.op == "not"
    load = predicate.args[0] if negated else predicate
    if not isinstance(load, Load) or load.dtype != "bool":
        return None
    *others, last = load.coords
    if last is not index("k") or any("k" in axes(c) for c in others):
        return None
    return Bytes(load.operand, len(others), scalar_function(lambda w: w.offset(load), count), negated)


def render_tile_map(spec: TileMap, plan: Plan) -> str:
    """One self-contained C++ source with the entry point ``ENTRY(const int64_t* arguments)``."""
    batch_index, runs, count = Body(prefix="b."), KeyRuns(), [0]
    shown = apply("where", spec.predicate, const(1.0, "float32"), const(0.0, "float32"), dtype="float32")
    lines = [f"which tiles hold an entry where {spec.predicate}", f"spec  {spec.to_json()}", *origin(plan)]
    program = key_program(batch_index, runs, count, "Visible", "1 where seen.", shown)
    header = "\n".join(f"// {line}" for line in lines)
    context = {
        "header": header, "plan": plan, "entry": ENTRY, "ctypes": C_TYPES,
        "max_length": MAX_LENGTH,
        "batch": spec.batch, "symbols": spec.symbols, "batch_sizes": [f"B{i}" for i in range(spec.batch)],
        "ranks": [o.rank for o in spec.operands], "key_programs": [program], "key_runs": runs.context(),
        "example": example(spec), "lse_ctype": "float",
        "batch_index": batch_index, "bytes": _bytes(spec.predicate, count), "rows": ROWS, "keys": KEYS,
        "empty": EMPTY, "partial": PARTIAL, "full": FULL,
    }  # fmt: skip
    text = environment().get_template("cpp/shared/tile_map.cpp.jinja").render(context)
    return finished(text, header, spec)
