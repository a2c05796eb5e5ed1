"""Where the gradients of a spec go: one Destination for query, key, value and each Term, whatever the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, Load, Symbol
from fuse.ir.gradient import Term, gradient
from fuse.ir.grid import Grid
from fuse.ir.interval import Leaves, Range, in_call, range_of
from fuse.ir.spec import AttentionSpec

_AXES = {"query": "qd", "key": "kd", "value": "ke"}
_POSITIONS = {"q", "k", "d", "e"}


class Unsupported(ValueError):
    """Gradients that this target does not compute; the message says which."""


@dataclass(frozen=True)
class Destination:
    """A gradient that the kernel writes: of query, key or value, or of what a Term reads.

    load   its element; the gradient has the shape of the operand
    order  the operand's dimensions from outermost to innermost in the gradient's memory
    kind   "matrix": of query, key or value, in the operand's dtype. Else in the kernel's real type, and added to:
           "dense": each batch index adds at distinct elements; "row", "key", "entry": each part of a batch index sums in a
           slice of its own, for each query, key or entry; "logit": a slice for each batch index, summed over its queries
    dims   "row", "key", "entry", "logit": dimensions that a slice covers; the innermost ones
    """

    name: str
    load: Load
    kind: str
    order: tuple[int, ...]
    dims: tuple[int, ...] = ()

    @property
    def once(self) -> tuple[str, ...]:
        """Indices of a matrix that its place does not depend on: they take one value."""
        read = frozenset().union(*map(expr.axes, self.load.coords))
        return tuple(axis for axis in _AXES.get(self.name, "") if axis not in read)


def destinations(spec: AttentionSpec, wanted: Sequence[bool]) -> tuple[Destination, ...]:
    """In the order in which the kernel takes their addresses. Raises Unsupported."""
    of = gradient(spec, tuple(wanted))
    loads = {"query": spec.query, "key": spec.key, "value": spec.value}
    found = [Destination(name, x, "matrix", tuple(range(len(x.coords)))) for name, x in loads.items() if wanted[x.operand]]
    if shared := overlapping(found, spec):
        raise Unsupported(f"batch indices or positions share parts of {', '.join(shared)}")
    found += [_term(f"term{i}", term) for i, term in enumerate(of.terms)]
    for to in found:
        inner = [n for c in to.load.coords for n in expr.walk(c) if isinstance(n, Load)]
        if any(wanted[n.operand] for n in inner):
            raise Unsupported(f"{to.load} is read at a place that depends on a tensor with a gradient")
    return tuple(found)


def overlapping(found: Sequence[Destination], spec: AttentionSpec, sizes: Mapping[str, int] | None = None) -> list[str]:
    """Of which matrices two batch indices, or two positions of one, write to the same elements without writing to all the same.

    sizes  of a call; without them what is so in every call
    """
    features = {"d": spec.qk_dim, "e": spec.v_dim}
    leaves = in_call({"q_len": 1, "kv_len": 1} if sizes is None else sizes, features)
    return [str(s.load) for s in found if s.kind == "matrix" and not _separate(s, leaves, sizes)]


def _separate(to: Destination, leaves: Leaves, sizes: Mapping[str, int] | None) -> bool:
    for coord in to.load.coords:
        inner = expr.axes(coord) & _POSITIONS
        if not inner:
            continue
        terms = _operands_of("add", coord)
        moved = [_digit(x, leaves, sizes) for x in terms if expr.axes(x) & inner]
        rest = [_digit(x, leaves, sizes) for x in terms if expr.axes(x) - inner]
        reach, step = _reach(moved), math.gcd(*(x.multiple for x in rest))
        if reach is None or not all(isinstance(x.of, Index) for x in moved):
            return False
        # x + m f(batch): other batch indices are elsewhere where x is less than m, or where x's terms are digits beside theirs
        if 0 < step <= reach < math.inf and _reach([*moved, *rest]) is None:
            return False
    return all(leaves(expr.index(axis)).high < 1 for axis in to.once)


@dataclass(frozen=True)
class _Digit:
    """A term of a place: ``step`` times ``of``, whose values are at most ``width`` apart. What is not known is infinite.

    multiple  what divides the term in every call; 0, which everything divides, for a size that is not known
    """

    of: Expr
    step: float
    width: float
    multiple: int


def _digit(term: Expr, leaves: Leaves, sizes: Mapping[str, int] | None) -> _Digit:
    factors = _operands_of("mul", term)
    by, of = [x for x in factors if _of_sizes(x)], [x for x in factors if not _of_sizes(x)]
    if len(of) != 1:
        by, of = [], [term]
    known = sizes is not None or not any(expr.symbols(x) for x in by)
    step = math.prod(int(Grid.over({}, sizes or {}, ()).evaluate(x)) for x in by) if known else 0
    there = range_of(of[0], leaves) if sizes is not None or expr.axes(of[0]) <= _POSITIONS else Range(0, math.inf)
    return _Digit(of[0], step if known else math.inf, float(there.high - there.low), step)


def _reach(digits: Sequence[_Digit]) -> float | None:
    """The largest difference of two sums of them, where no two choices of their values have the same sum; else None."""
    reach = 0.0
    for x in sorted(digits, key=lambda x: x.step):
        if x.width > 0:
            if x.step <= reach < math.inf:
                return None
            reach += x.step * x.width
    return reach


def _operands_of(op: str, node: Expr) -> list[Expr]:
    """Of a sum or a product."""
    return [x for a in node.operands for x in _operands_of(op, a)] if isinstance(node, Apply) and node.op == op else [node]


def _of_sizes(node: Expr) -> bool:
    return all(isinstance(n, (Apply, Const, Symbol)) for n in expr.walk(node))


def _term(name: str, term: Term) -> Destination:
    axes = term.axes & {"q", "k"}
    varying = tuple(d for d, c in enumerate(term.load.coords) if expr.axes(c) & {"q", "k"})
    order = (*(d for d in range(len(term.load.coords)) if d not in varying), *varying)
    if term.root.startswith("extra_logits"):
        return Destination(name, term.load, "logit", order, varying)
    if axes == {"q", "k"} and term.distinct:
        return Destination(name, term.load, "dense", tuple(range(len(order))))
    return Destination(name, term.load, {"": "row", "q": "row", "k": "key"}.get("".join(sorted(axes)), "entry"), order, varying)
