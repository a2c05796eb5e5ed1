"""Which parts of a call are calls of the same spec: those of some elements of a batch index, where the spec says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, Load
from fuse.ir.interval import Leaves, Range, anywhere, range_of
from fuse.ir.spec import AttentionSpec, IntLike


@dataclass(frozen=True)
class Counted:
    """A dimension of an operand that holds ``inner`` elements for each ``group`` of neighbouring values of a batch index."""

    dim: int
    group: int = 1
    inner: int = 1

    def fits(self, length: IntLike, count: IntLike, parts: IntLike) -> bool:
        """Whether equal parts of a dimension of that length belong to equal parts of an index with ``count`` values."""
        return bool(count % (parts * self.group) == 0 and length == count // self.group * self.inner)


@cache
def counted(spec: AttentionSpec, number: int) -> Mapping[int, Counted] | None:
    """How operands count batch index ``number``; one that is missing is read alike for all of its values.

    None where a part of the index is no call by itself: the spec computes with its value, or with how many there are, or reads
    an operand in several ways.
    """
    axis, roots = f"b{number}", list(spec.roots().values())
    if f"B{number}" in expr.symbols(*roots):
        return None
    found: dict[int, Counted] = {}
    loads = [n for n in expr.walk(*roots) if isinstance(n, Load)]
    for load in loads:
        at = [(dim, x) for dim, x in enumerate(load.coords) if axis in expr.axes(x)]
        if not at:
            continue
        way = _counted(spec, axis, *at[0]) if len(at) == 1 else None
        if way is None or found.setdefault(load.operand, way) != way:
            return None
    whole = {n.operand for n in loads if axis not in expr.axes(n)}
    return None if whole & found.keys() or any(_computes_with(axis, root) for root in roots) else found


def _counted(spec: AttentionSpec, axis: str, dim: int, coordinate: Expr) -> Counted | None:
    """Of ``inner * (axis // group) + rest``, where 0 <= rest < inner."""
    terms = list(_terms(coordinate))
    of_axis = [t for t in terms if axis in expr.axes(t)]
    rest = [t for t in terms if axis not in expr.axes(t)]
    block, inner = _product(of_axis[0])
    group = _group(block, axis)
    if len(of_axis) != 1 or group is None:
        return None
    within = _sum([range_of(t, _leaves(spec)) for t in rest])
    return Counted(dim, group, inner) if within.low >= 0 and within.high < inner else None


def _terms(x: Expr) -> Iterator[Expr]:
    if isinstance(x, Apply) and x.op == "add":
        for operand in x.operands:
            yield from _terms(operand)
    else:
        yield x


def _product(x: Expr) -> tuple[Expr, int]:
    """A factor and a constant."""
    if isinstance(x, Apply) and x.op == "mul":
        for factor, by in (x.operands, x.operands[::-1]):
            if isinstance(by, Const):
                return factor, int(by.value)
    return x, 1


def _group(x: Expr, axis: str) -> int | None:
    """Of ``axis // group``; None for all else."""
    if x is expr.index(axis):
        return 1
    if isinstance(x, Apply) and x.op == "floordiv" and x.operands[0] is expr.index(axis):
        by = x.operands[1]
        return int(by.value) if isinstance(by, Const) and by.value > 0 else None
    return None


def _leaves(spec: AttentionSpec) -> Leaves:
    lengths = {"d": spec.qk_dim, "e": spec.v_dim}
    return lambda n: Range(0, lengths[n.axis] - 1) if isinstance(n, Index) and n.axis in lengths else anywhere(n)


def _sum(ranges: list[Range]) -> Range:
    return Range(sum(r.low for r in ranges), sum(r.high for r in ranges))


def _computes_with(axis: str, root: Expr) -> bool:
    """Whether its value is used for anything but to find an element of an operand."""
    without = expr.rewrite(root, lambda n: expr.const(0, n.dtype) if isinstance(n, Load) else None)
    return axis in expr.axes(without)
