"""Tiles that hardware can copy by itself, from the shape and strides of the tensor that they lie in: a kernel then computes
neither addresses nor conditions (CUDA C++ Programming Guide, tensor memory access).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, Load, const
from fuse.ir.spec import AttentionSpec

# Dimensions that a descriptor may have.
_MOST = 5
# Elements of 16 bits between which a tile may begin.
_UNIT = 8
_INNER = frozenset({"q", "k", "d", "e"})


@dataclass(frozen=True)
class Rows:
    """A tile is a rectangle of its tensor.

    dims   the tensor's dimensions: those in which it is at one place, that of its rows, and that of their features
    start  where the features begin: 0, or a head's place among all features
    """

    dims: tuple[int, ...]
    start: Expr

    @property
    def places(self) -> tuple[int, ...]:
        return self.dims[:-2]

    @property
    def apart(self) -> bool:
        """Whether the features have their dimension for themselves, so that there is nothing beyond them."""
        return isinstance(self.start, Const)


def rows_of(load: Load) -> Rows | None:
    """How the tiles of ``load`` lie in its operand; None where they are no rectangles of it."""
    inner = [dim for dim, c in enumerate(load.coords) if expr.axes(c) & _INNER]
    rows = [dim for dim in inner if isinstance(c := load.coords[dim], Index) and c.axis in ("q", "k")]
    features = {dim: start for dim in inner if (start := _start(load.coords[dim])) is not None}
    if len(rows) != 1 or sorted([*rows, *features]) != inner or len(features) != 1 or len(load.coords) > _MOST:
        return None
    ((feature, start),) = features.items()
    return Rows((*(dim for dim in range(len(load.coords)) if dim not in inner), rows[0], feature), start)


def _start(coord: Expr) -> Expr | None:
    """start, where the coordinate is a feature, or a feature plus what depends on the batch alone."""
    if isinstance(coord, Index):
        return const(0) if coord.axis in ("d", "e") else None
    if not isinstance(coord, Apply) or coord.op != "add":
        return None
    a, b = coord.operands
    feature, rest = (a, b) if isinstance(a, Index) else (b, a)
    alone = isinstance(feature, Index) and feature.axis in ("d", "e") and not expr.axes(rest) & _INNER
    return rest if alone and not isinstance(rest, Const) and _multiple(rest) % _UNIT == 0 else None


def _multiple(node: Expr) -> int:
    """A constant that divides every value of ``node``."""
    if isinstance(node, Const):
        return int(node.value)
    if isinstance(node, Apply) and node.op in ("add", "mul"):
        of_each = [_multiple(n) for n in node.operands]
        return math.gcd(*of_each) if node.op == "add" else math.prod(of_each)
    return 1


def describable(spec: AttentionSpec) -> bool:
    """Whether tiles of query, key and value are rectangles, and of the 16 bits that matrix units take from shared memory."""
    loads = {spec.query: spec.qk_dim, spec.key: spec.qk_dim, spec.value: spec.v_dim}
    dtypes = {spec.out_dtype, *(load.dtype for load in loads)}
    if len(dtypes) != 1 or not dtypes <= {"bfloat16", "float16"}:
        return False
    found = [(rows_of(load), features) for load, features in loads.items()]
    # Tiles are as wide as a power of two, and beyond the features there may be those of another head.
    return all(rows is not None and (rows.apart or features in (16, 32, 64, 128, 256)) for rows, features in found)
