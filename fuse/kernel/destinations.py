"""Where the gradients of a spec go: one Destination for query, key, value and each Term, whatever the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, Load
from fuse.ir.gradient import Term, gradient
from fuse.ir.interval import MAX_LENGTH
from fuse.ir.spec import AttentionSpec


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


def destinations(spec: AttentionSpec, wanted: Sequence[bool]) -> tuple[Destination, ...]:
    """In the order in which the kernel takes their addresses. Raises Unsupported."""
    of = gradient(spec, tuple(wanted))
    loads = {"query": spec.query, "key": spec.key, "value": spec.value}
    extents = {"d": spec.qk_dim, "e": spec.v_dim}
    found = [Destination(name, x, "matrix", tuple(range(len(x.coords)))) for name, x in loads.items() if wanted[x.operand]]
    if shared := [str(s.load) for s in found if not _separate(s.load, extents)]:
        raise Unsupported(f"batch indices share parts of {', '.join(shared)}")
    found += [_term(f"term{i}", term) for i, term in enumerate(of.terms)]
    for to in found:
        inner = [n for c in to.load.coords for n in expr.walk(c) if isinstance(n, Load)]
        if any(wanted[n.operand] for n in inner):
            raise Unsupported(f"{to.load} is read at a place that depends on a tensor with a gradient")
    return tuple(found)


def _separate(load: Load, extents: Mapping[str, int]) -> bool:
    """Whether two batch indices read the same elements or none in common, and no element twice."""
    seen: list[str] = []
    for coord in load.coords:
        inner = expr.axes(coord) & {"q", "k", "d", "e"}
        if not inner:
            continue
        terms = _terms_of(coord)
        moved = [x for x in terms if expr.axes(x) & inner]
        if len(moved) != 1 or not isinstance(moved[0], Index):
            return False
        # x + m f(batch): other batch indices are elsewhere where x is less than m
        steps = [_multiple(x) for x in terms if expr.axes(x) - inner]
        if steps and not 0 < extents.get(moved[0].axis, MAX_LENGTH) <= math.gcd(*steps):
            return False
        seen.append(moved[0].axis)
    return len(seen) == len(set(seen)) == 2


def _terms_of(node: Expr) -> list[Expr]:
    if isinstance(node, Apply) and node.op == "add":
        return [x for a in node.operands for x in _terms_of(a)]
    return [node]


def _multiple(node: Expr) -> int:
    """A constant that divides every value of ``node``."""
    constants = [a.value for a in node.args if isinstance(a, Const)] if isinstance(node, Apply) and node.op == "mul" else []
    return int(constants[0]) if constants else 1


def _term(name: str, term: Term) -> Destination:
    axes = term.axes & {"q", "k"}
    varying = tuple(d for d, c in enumerate(term.load.coords) if expr.axes(c) & {"q", "k"})
    order = (*(d for d in range(len(term.load.coords)) if d not in varying), *varying)
    if term.root.startswith("extra_logits"):
        return Destination(name, term.load, "logit", order, varying)
    if axes == {"q", "k"} and term.distinct:
        return Destination(name, term.load, "dense", tuple(range(len(order))))
    return Destination(name, term.load, {"": "row", "q": "row", "k": "key"}.get("".join(sorted(axes)), "entry"), order, varying)
