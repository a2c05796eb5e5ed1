"""TileMap: where a mask that is read from a tensor lets anything be seen at all.

A predicate that depends on an opaque tensor has no loop bounds. Its map says of every cell of ROWS queries × KEYS keys
whether it is EMPTY, PARTIAL or FULL; it is computed once for all heads and layers that read the same mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fuse.ir import expr, serial
from fuse.ir.expr import Apply, Const, Expr, Index, Load, apply, const, index
from fuse.ir.spec import AttentionSpec, IntLike, Operand

ROWS, KEYS = 16, 64
# No target has larger tiles: what changes in steps of this many positions tells by itself which can be skipped.
COARSE = 128
EMPTY, PARTIAL, FULL = range(3)


@dataclass(frozen=True)
class TileMap:
    """The classes of a predicate's cells, uint8 of shape (B0, …, ceil(q_len / ROWS), ceil(kv_len / KEYS)).

    batch      number of batch dimensions, which are those that the predicate depends on
    operands   the tensors it reads
    predicate  bool over batch, q, k
    extra      names of further int64 symbols, as in AttentionSpec
    """

    batch: int
    operands: tuple[Operand, ...]
    predicate: Expr
    extra: tuple[str, ...] = ()

    out_dtype = "uint8"

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*(f"B{i}" for i in range(self.batch)), "q_len", "kv_len", *self.extra)

    def out_shape(self, sizes: Sequence[IntLike]) -> tuple[IntLike, ...]:
        q_len, kv_len = sizes[self.batch : self.batch + 2]
        return (*sizes[: self.batch], -(-q_len // ROWS), -(-kv_len // KEYS))

    def out_strides(self, sizes: Sequence[IntLike]) -> tuple[IntLike, ...]:
        strides: list[IntLike] = [1]
        for size in reversed(self.out_shape(sizes)[1:]):
            strides.append(strides[-1] * size)
        return tuple(reversed(strides))

    def to_json(self) -> str:
        operands = [[o.rank, o.dtype] for o in self.operands]
        data = {
            "batch": self.batch,
            "operands": operands,
            "expr": serial.to_json({"predicate": self.predicate}),
            "extra": self.extra,
        }
        return json.dumps(data, separators=(",", ":"), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> TileMap:
        data = serial.loads(text)
        predicate = serial.from_json(data["expr"])["predicate"]
        return TileMap(data["batch"], tuple(Operand(*o) for o in data["operands"]), predicate, tuple(data["extra"]))


@dataclass(frozen=True)
class Use:
    """How a spec uses a map.

    operands, symbols  the spec's, in the map's order
    load               reads the cell of (q, k); its operand comes after the spec's own
    """

    tile_map: TileMap
    operands: tuple[int, ...]
    symbols: tuple[str, ...]
    load: Load


def _of_positions(load: Load) -> bool:
    """Whether an operand has a dimension of queries and another one of keys; a table of distances has one of both."""
    axes = [expr.axes(c) & {"q", "k"} for c in load.coords if not _is_coarse(c)]
    return any("q" in a and "k" in b for i, a in enumerate(axes) for j, b in enumerate(axes) if i != j)


def _is_coarse(e: Expr) -> bool:
    divides = isinstance(e, Apply) and e.op == "floordiv" and isinstance(e.operands[0], Index)
    return divides and isinstance(e.args[1], Const) and e.args[1].value >= COARSE


def map_of(spec: AttentionSpec) -> Use | None:
    """The map that tells which tiles of ``spec`` can be skipped; None where no tensor of queries and keys masks anything."""
    residual = None if spec.mask is None else spec.mask.residual
    if residual is None or not any(isinstance(n, Load) and _of_positions(n) for n in expr.walk(residual)):
        return None
    batch = [f"b{i}" for i in range(spec.batch) if f"b{i}" in expr.axes(residual)]
    others = [s for s in expr.symbols(residual) if s not in ("q_len", "kv_len")]
    sizes = {f"B{b[1:]}": f"B{i}" for i, b in enumerate(batch)} | {"q_len": "q_len", "kv_len": "kv_len"}
    extra = {name: f"n{i}" for i, name in enumerate(o for o in others if o not in sizes)}
    (predicate,), operands = expr.renumbered([residual], {b: f"b{i}" for i, b in enumerate(batch)}, sizes | extra)
    tile_map = TileMap(len(batch), tuple(spec.operands[i] for i in operands), predicate, tuple(extra.values()))
    cell = (apply("floordiv", index(axis), const(n), dtype="int64") for axis, n in (("q", ROWS), ("k", KEYS)))
    load = Load("uint8", len(spec.operands), (*map(index, batch), *cell))
    return Use(tile_map, operands, (*sizes, *extra), load)
