"""Where the gradients of a spec go: one Destination for query, key, value and each Term, whatever the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, Load, Symbol
from fuse.ir.gradient import Term, gradient
from fuse.ir.grid import Grid
from fuse.ir.spec import AttentionSpec

_AXES = {"query": "qd", "key": "kd", "value": "ke"}


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
    extents = {"d": spec.qk_dim, "e": spec.v_dim}
    extents |= {"q": 1, "k": 1} if sizes is None else {"q": sizes["q_len"], "k": sizes["kv_len"]}
    return [str(s.load) for s in found if s.kind == "matrix" and not _separate(s, extents, sizes or {})]


def _separate(to: Destination, extents: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    seen: list[str] = []
    for coord in to.load.coords:
        inner = expr.axes(coord) & {"q", "k", "d", "e"}
        if not inner:
            continue
        terms = _terms_of(coord)
        steps = [_step(x, sizes) for x in terms if expr.axes(x) & inner]
        if None in steps:
            return False
        reach = 0.0  # how far indices with smaller steps than the next one get
        for size, axis in sorted(filter(None, steps)):
            seen.append(axis)
            if extents[axis] > 1:
                if size <= reach < math.inf:
                    return False
                reach += size * (extents[axis] - 1)
        # x + m f(batch): other batch indices are elsewhere where x is less than m
        step = math.gcd(*(_multiple(x, sizes) for x in terms if expr.axes(x) - inner))
        if 0 < step <= reach < math.inf:
            return False
    return len(seen) == len(set(seen)) and all(extents[axis] <= 1 for axis in to.once)


def _step(node: Expr, sizes: Mapping[str, int]) -> tuple[float, str] | None:
    """How far apart neighbours along an index are, and the index; infinity by a size that is not known. None: otherwise."""
    if isinstance(node, Index):
        return 1, node.axis
    if not isinstance(node, Apply) or node.op != "mul" or not any(isinstance(a, Index) for a in node.operands):
        return None
    axis, by = sorted(node.operands, key=lambda a: not isinstance(a, Index))
    if not isinstance(axis, Index) or not _of_sizes(by):
        return None
    known = sizes.keys() >= set(expr.symbols(by))
    size = int(Grid.over({}, sizes, ()).evaluate(by)) if known else math.inf
    return (size, axis.axis) if size > 0 else None


def _terms_of(node: Expr) -> list[Expr]:
    if isinstance(node, Apply) and node.op == "add":
        return [x for a in node.operands for x in _terms_of(a)]
    return [node]


def _multiple(node: Expr, sizes: Mapping[str, int]) -> int:
    """What divides every value of ``node``; 0, which everything divides, for a size that is not known."""
    if isinstance(node, Apply) and node.op == "mul":
        return math.prod(_multiple(a, sizes) for a in node.operands)
    if isinstance(node, Symbol):
        return sizes.get(node.name, 0)
    known = _of_sizes(node) and sizes.keys() >= set(expr.symbols(node))
    return int(Grid.over({}, sizes, ()).evaluate(node)) if known else 1


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
