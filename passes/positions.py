"""Whether all that attention reads is computed for each position by itself.

Where a sequence lies on several ranks, attention sees all of it and everything else a shard. That is what the model computes
on the whole only if each position is computed from itself: a convolution over positions, a running sum of them, or numbers of
positions that begin at 0 on every rank would be others. Each operand of a site is read backwards, one operation at a time, at
one position: each tensor that has positions has to be read at the same one. What an operation reads that is not known here may
be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch.fx import Graph, Node

from fuse.ir import expr
from fuse.ir.expr import Expr, Load, const
from fuse.ir.index import IndexExpr
from fuse.passes.lift import Lifted
from fuse.passes.read.elements import HANDLERS, Reader, arguments, dims, op_name
from fuse.passes.read.graph import State, location, operator_name, user_name
from fuse.passes.read.pointwise import broadcast
from fuse.passes.read.trace import Trace, Value, trace
from fuse.report.reasons import Declined, NotSpread

POSITION = "position"
_MIXES = "reads other positions than its own"
Coords = tuple[IndexExpr | None, ...]  # None: any place along this dimension


@dataclass(frozen=True)
class Asked:
    """An element that is read: ``coords`` in terms of the position.

    by  the operation that reads it, or the one before that lost the position
    """

    value: Value
    coords: Coords
    by: Value | None = None

    @property
    def placed(self) -> bool:
        return any(c is not None for c in self.coords)


class _Step(Reader):
    """Reads one operation: elements of its operands are loads."""

    def element(self, value: Value, coords: Sequence[IndexExpr]) -> Expr:
        return self.load(value, coords) if value.literal is None else const(value.literal, value.dtype)


@dataclass(frozen=True)
class Root:
    """Where a site of the graph was read, and from which trace."""

    node: Node
    lifted: Lifted
    trace: Trace


@dataclass
class Positions:
    """Of one graph, all of whose sites stand at ``roots``."""

    graph: Graph
    states: Mapping[Node, State]
    roots: Sequence[Root]
    _trace: Trace | None = None
    _seen: set[tuple[Value, Coords]] = field(default_factory=set)

    def check(self, lifted: Lifted, site: Trace) -> None:
        """Raises Declined where an operand of a site, read from the trace ``site``, is no function of its own position."""
        assert lifted.plan is not None
        places = dict((*lifted.plan.queries, *lifted.plan.keys))
        pending = [
            Asked(leaf, tuple(_S if places.get(i) == d else None for d in range(len(leaf.shape))))
            for i, leaf in enumerate(lifted.leaves)
        ]
        results = {t.value_of[r.node]: r.lifted for r in self.roots for t in (r.trace, self.trace)}
        while pending:
            asked = pending.pop()
            if (asked.value, asked.coords) not in self._seen:
                self._seen.add((asked.value, asked.coords))
                pending += self._behind(asked, lifted.sizes[-1], results, site)

    @property
    def trace(self) -> Trace:
        """Of the graph up to its last site. What linear layers give is not computed: with a bias that would fix sizes."""
        if self._trace is None:
            order = list(self.graph.nodes)
            last = max(order.index(root.node) for root in self.roots)
            calls = [n for n in order[: last + 1] if n.op in ("call_function", "call_method") and not _is_state(n)]
            inputs = [n for n in order if n.op in ("placeholder", "get_attr") or (n in calls and _is_linear(n))]
            self._trace = trace([n for n in calls if not _is_linear(n)], inputs, self.states)
        return self._trace

    def _behind(self, asked: Asked, length: IndexExpr, results: Mapping[Value, Lifted], site: Trace) -> list[Asked]:
        """What an element is made of. Raises Declined where that is not of its position alone."""
        value = asked.value
        if value in results:
            self._check_result(asked, results[value])
            return []
        if value.op is None:
            whole = self.trace.value_of.get(site.node_of[value]) if value in site.node_of else None
            if whole is not None and whole is not value:
                return [Asked(whole, asked.coords, asked.by)]
            node = self.trace.node_of.get(value)
            if node is not None and _is_linear(node):
                return [_next(asked, self.trace.value_of[node.all_input_nodes[0]], [*asked.coords[:-1], None])]
            self._check_input(asked, length)
            return []
        reader = _Step()
        reader.space.add(POSITION, length)
        coords = [_in_scope(reader, d, c, n) for d, (c, n) in enumerate(zip(asked.coords, dims(value), strict=True))]
        rule = _rule(value)
        return (
            self._read(asked, reader, coords) if rule is None else [_next(asked, v, found) for v, found in rule(value, coords)]
        )

    def _read(self, asked: Asked, reader: _Step, coords: Sequence[IndexExpr]) -> list[Asked]:
        """By what reads the operation for specs, too."""
        value = asked.value
        found = HANDLERS[op_name(value)](reader, value, tuple(coords))
        loads = [n for n in expr.walk(found) if isinstance(n, Load)]
        if any(reader.leaves[n.operand] is value for n in loads):
            return [_next(asked, v, c) for v, c in _anything(value, coords)]
        if POSITION in expr.axes(expr.rewrite(found, lambda n: const(0, n.dtype) if isinstance(n, Load) else None)):
            counts = "counts the positions of this shard from 0: hand the model the position ids of the whole sequence"
            raise Declined(_reason(value, _MIXES if value.inputs() else counts))
        return [_next(asked, reader.leaves[n.operand], [reader.index(c) for c in n.coords]) for n in loads]

    def _check_result(self, asked: Asked, lifted: Lifted) -> None:
        queries = lifted.out_dims.index(lifted.spec.batch)
        if any(c != (_S if d == queries else None) for d, c in enumerate(asked.coords)):
            raise Declined(_reason(asked.by or asked.value, _MIXES))

    def _check_input(self, asked: Asked, length: IndexExpr) -> None:
        node = self.trace.node_of.get(asked.value)
        for c, n in zip(asked.coords, dims(asked.value), strict=True):
            if n == length and c != _S:
                what = NotSpread(f"all of {'a tensor' if node is None else user_name(node)} is read at each position")
                raise Declined(what if asked.by is None else _reason(asked.by, _MIXES))
            if n != length and c is not None:
                name = "a tensor" if node is None else user_name(node)
                raise Declined(NotSpread(f"{name} is read at the positions of this shard, which begin at 0 on every rank"))


_S = sympy.Symbol(POSITION, integer=True)


def _next(asked: Asked, value: Value, coords: Sequence[IndexExpr | None]) -> Asked:
    found = Asked(value, tuple(map(_canonical, coords)))
    return replace(found, by=asked.by if asked.by is not None and not asked.placed else asked.value)


def _in_scope(reader: _Step, d: int, c: IndexExpr | None, size: IndexExpr) -> IndexExpr:
    """A coordinate whose symbols the reader knows the ranges of."""
    if c is None:
        return sympy.Integer(0) if size == 1 else reader.space.add(f"any{d}", size)
    for x in c.free_symbols:
        if x.name.startswith("kept"):
            reader.space.add(x.name, size)
    return c


def _canonical(c: IndexExpr | None) -> IndexExpr | None:
    """None where a coordinate has nothing to do with the position; the names of others in it do not matter."""
    if c is None or not c.has(_S):
        return None
    others = sorted((x for x in c.free_symbols if x.name.startswith(("any", "kept"))), key=str)
    return c.subs({x: sympy.Symbol(f"kept{i}", integer=True) for i, x in enumerate(others)}, simultaneous=True)


def _rule(value: Value) -> Rule | None:
    """What tells the elements that ``value`` reads; None: what reads it for specs."""
    assert value.op is not None
    if (rule := RULES.get(op_name(value))) is not None:
        return rule
    if _draws(value):
        return _pointwise
    if op_name(value) in HANDLERS:
        return None
    return _pointwise if torch.Tag.pointwise in value.op.tags else _anything


def _draws(value: Value) -> bool:
    assert value.op is not None
    return torch.Tag.nondeterministic_seeded in value.op.tags


def _is_state(node: Node) -> bool:
    """Of what surrounds computations: see fuse.passes.read.graph.states."""
    return operator_name(node) in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


def _is_linear(node: Node) -> bool:
    return node.op == "call_function" and operator_name(node) == "linear" and len(node.args) >= 2


def _reason(value: Value, what: str) -> NotSpread:
    node = value.origin
    return NotSpread(
        f"{op_name(value) if node is None else operator_name(node)} {what}", "" if node is None else location(node)
    )


# ------------------------------------------------------------------------- what operations read that specs need not know

Rule = Callable[[Value, Sequence[IndexExpr]], Iterator[tuple[Value, Sequence[IndexExpr | None]]]]


def _pointwise(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    return ((x, broadcast(tuple(coords), x)) for x in value.inputs())


def _anything(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    return ((x, [None] * len(x.shape)) for x in value.inputs())


def _product(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    *added, left, right = (x for x in value.args if isinstance(x, Value))
    *batch, row, column = coords
    yield from ((x, broadcast(tuple(coords), x)) for x in added)
    yield from ((left, [*batch, row, None]), (right, [*batch, None, column]))


def _reduction(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    """Over the dimensions that its arguments name, or all."""
    a, x = arguments(value), value.inputs()[0]
    given = a.get("dim", a.get("dims"))
    rank = len(x.shape)
    over = {d % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
    left = list(coords)
    if len(left) == rank:  # it keeps them, or is as large as what it reads
        yield x, [None if d in over else c for d, c in enumerate(left)]
    else:
        yield x, [None if d in over else left.pop(0) for d in range(rank)]


def _row_norm(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    """Over the last dimensions, as many as ``normalized_shape`` has. The statistics beside the result have them, too."""
    x, *others = value.inputs()
    kept = len(x.shape) - len(arguments(value)["normalized_shape"])
    yield x, [*coords[:kept], *[None] * (len(x.shape) - kept)]
    yield from ((y, [None] * len(y.shape)) for y in others)


def _lookup(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    a = arguments(value)
    yield from ((a["weight"], [None, coords[-1]]), (a["indices"], coords[:-1]))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "logsumexp", "var", "var_mean", "std", "prod", "any", "all", "argmax",
         "linalg_vector_norm", "norm", "_softmax", "_log_softmax", "_safe_softmax"), _reduction,
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _row_norm),
    "embedding": _lookup,
}  # fmt: skip
