"""Whether all that attention reads is computed for each position by itself.

Where a sequence lies on several ranks, attention sees all of it and everything else a shard. That is what the model computes
on the whole only if each position is computed from itself: a convolution over positions, a running sum of them, or numbers of
positions that begin at 0 on every rank would be others. Each operand of a site is read backwards, one operation at a time, at
one position: each tensor that has positions has to be read at the same one. What an operation reads that is not known here may
be anything. The same is asked of what a graph gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from fuse.ir import expr
from fuse.ir.expr import Expr, Index, Load, Symbol, const
from fuse.ir.index import IndexExpr
from fuse.parallel.plan import Plan
from fuse.passes.read.bodies import Body, graphs_of
from fuse.passes.read.elements import HANDLERS, Reader, arguments, as_index, dims, op_name
from fuse.passes.read.flex import is_flex
from fuse.passes.read.graph import location, operator_name, states, tensor_of, user_name
from fuse.passes.read.pointwise import broadcast
from fuse.passes.read.trace import Value, trace
from fuse.passes.replace import live_nodes
from fuse.report.reasons import Declined, NotSpread
from fuse.report.site import Site
from fuse.torch_private import hint, pytree

POSITION = "position"
_OP = torch.ops.fuse.context_attention.default
_MIXES = "reads other positions than its own"
_COUNTS = "computes with the length of this shard, which is not that of the sequence"
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


def misplaced(found: Sequence[Body], others: bool) -> Iterator[Site]:
    """What of the graphs ``found``, attention in its place, is not computed for each position by itself.

    others  whether there are normalisations that are no attention: then what has as many places as an input is looked at where
            there is no attention, too
    """
    attends = any(n.target is _OP for body in found for n in body.graph.nodes)
    checked = list(map(_Positions, found)) if attends or others else []
    yield from (Site(False, p.failed.reason, p.where, "") for p in checked if p.failed is not None)
    whole = [positions for positions in checked if positions.failed is None]
    lengths = frozenset(length for positions in whole for length in (positions.lengths if attends else positions.symbols))
    for positions in whole:
        positions.lengths_of_all = lengths if attends else frozenset()
        yield from (declined for length in lengths for declined in positions.check(length))


class _Positions:
    """Of one graph.

    failed          why it cannot be told
    lengths_of_all  of sequences, be they attended to in this graph or another
    alike           the length that is looked at, and sizes of inputs that are as large, which may be the same
    """

    def __init__(self, body: Body) -> None:
        self.graph = body.graph
        self.failed: Declined | None = None
        self.lengths_of_all: Set[IndexExpr] = frozenset()
        self.alike: Set[IndexExpr] = frozenset()
        self.seen: set[tuple[Value, Coords, IndexExpr]] = set()
        calls = [n for n in self.graph.nodes if n.op in ("call_function", "call_method") and not _is_state(n)]
        matter = live_nodes(self.graph, calls, {})  # not the tables of a BlockMask, whose function attention was read from
        calls = [n for n in calls if n in matter]
        given = {n for n in calls if any(of(n) for of in (_is_linear, _is_called, _is_part_of_call, _is_number))}
        inputs = [n for n in self.graph.nodes if n.op in ("placeholder", "get_attr") or n in given]
        try:
            self.trace = trace([n for n in calls if n not in given], inputs, states(self.graph, body.begins))
        except Declined as d:
            self.failed = d

    @property
    def where(self) -> str:
        """Its first attention."""
        return next((location(n) for n in self.graph.nodes if n.target is _OP), "")

    @property
    def lengths(self) -> list[IndexExpr]:
        """Of the shards that attention is of."""
        return [as_index(v.args[1][-1]) for v in self._attention.values()]

    @property
    def symbols(self) -> dict[IndexExpr, int | None]:
        """Sizes of inputs that are no numbers, and how large they are in the call that is compiled."""
        tensors = [t for n in self.graph.find_nodes(op="placeholder") if (t := tensor_of(n)) is not None]
        shapes: Iterator[Any] = (n for t in tensors for n in t.shape)
        sizes = [n for n in shapes if isinstance(n, torch.SymInt)]
        return {as_index(n): hint(n) for n in sizes if as_index(n).is_Symbol}

    def _as_large(self, length: IndexExpr) -> Set[IndexExpr]:
        known = self.symbols
        return {length, *(n for n, size in known.items() if size is not None and size == known.get(length))}

    @property
    def _attention(self) -> dict[Node, Value]:
        """The calls of the op, by the nodes that hold their results."""
        return {n: v for n, v in self.trace.value_of.items() if v.op is _OP}

    def check(self, length: IndexExpr) -> Iterator[Site]:
        """What is read at other positions: one site for each attention that reads it, or for the graph's outputs."""
        self.alike = self._as_large(length)
        asked = [(n, list(self._operands(v))) for n, v in self._attention.items() if as_index(v.args[1][-1]) == length]
        out = self.graph.output_node()
        for node, pending in [*asked, (out, list(self._outputs(out, length)))]:
            try:
                self._follow(pending, length)
            except Declined as d:
                yield Site(False, d.reason, "the graph's output" if node is out else location(node), "")

    def _operands(self, call: Value) -> Iterator[Asked]:
        plan = Plan.from_json(call.args[4])
        places = dict((*plan.queries, *plan.keys))
        for i, leaf in enumerate(call.args[0]):
            yield Asked(leaf, tuple(_S if places.get(i) == d else None for d in range(len(leaf.shape))))

    def _outputs(self, out: Node, length: IndexExpr) -> Iterator[Asked]:
        for node in out.all_input_nodes:
            value = self.trace.value_of.get(node)
            if value is not None and length in dims(value):
                yield Asked(value, tuple(_S if n == length else None for n in dims(value)))

    def _follow(self, pending: list[Asked], length: IndexExpr) -> None:
        """Raises Declined where an element is made of other positions than its own."""
        while pending:
            asked = pending.pop()
            if (key := (asked.value, asked.coords, length)) not in self.seen:
                self.seen.add(key)
                pending += self._behind(asked, length)

    def _behind(self, asked: Asked, length: IndexExpr) -> Iterable[Asked]:
        value = asked.value
        if value.op is None:
            return self._given(asked, length)
        if value.op is _OP:
            self._check_plain(asked, length)
            return ()
        reader = _Step()
        reader.space.add(POSITION, length)
        coords = [_in_scope(reader, d, c, n) for d, (c, n) in enumerate(zip(asked.coords, dims(value), strict=True))]
        rule = _rule(value)
        if any(n.free_symbols & self.alike for n in _numbers(value, sizes=rule is None or _draws(value))):
            raise Declined(self._reason(value, _COUNTS))
        return self._read(asked, reader, coords) if rule is None else self._by(rule, asked, coords)

    def _by(self, rule: Rule, asked: Asked, coords: Sequence[IndexExpr]) -> list[Asked]:
        if rule is _anything and asked.placed:
            raise Declined(self._reason(asked.value, _MIXES))
        return [self._next(asked, v, found) for v, found in rule(asked.value, coords)]

    def _next(self, asked: Asked, value: Value, coords: Sequence[IndexExpr | None]) -> Asked:
        """What is read of an operand. Whatever it holds, what reads all its positions may count them, as a sum of ones does."""
        found = _next(asked, value, coords)
        if any(c is None and n.free_symbols & self.alike for c, n in zip(coords, dims(value), strict=True)):
            raise Declined(self._reason(found.by or value, _MIXES))
        return found

    def _given(self, asked: Asked, length: IndexExpr) -> Iterable[Asked]:
        """Of what was not run: inputs, linear layers, and calls of graphs, whose outputs are looked at by themselves."""
        node = self.trace.node_of.get(asked.value)
        if node is not None and _is_linear(node):
            return self._of_linear(asked, node)
        self._check_plain(asked, length)
        if node is None or node.op != "call_function":
            return ()
        call = node.all_input_nodes[0] if _is_part_of_call(node) else node
        held = self.trace.value_of
        read = [held[n] for n in call.all_input_nodes if n in held and n.op != "get_attr"]
        return [Asked(v, tuple(_S if asked.placed and n == length else None for n in dims(v)), asked.value) for v in read]

    def _of_linear(self, asked: Asked, node: Node) -> Iterator[Asked]:
        """Weight and bias may have positions, too."""
        *rows, column = (sympy.Integer(0) if c is None else c for c in asked.coords)
        coords: list[Sequence[IndexExpr | None]] = [[*rows, None], [column, None], [column]]
        for x, at in zip((*node.args, *node.kwargs.values()), coords, strict=False):
            if isinstance(x, Node):
                yield self._next(asked, self.trace.value_of[x], at)

    def _read(self, asked: Asked, reader: _Step, coords: Sequence[IndexExpr]) -> list[Asked]:
        """By what reads the operation for specs, too."""
        value = asked.value
        found = HANDLERS[op_name(value)](reader, value, tuple(coords))
        loads = [n for n in expr.walk(found) if isinstance(n, Load)]
        if any(reader.leaves[n.operand] is value for n in loads):
            return self._by(_anything, asked, coords)
        at = [(reader.leaves[n.operand], [reader.index(c) for c in n.coords]) for n in loads]
        written = list(_beside_loads(found))
        sizes = {n for _, coords in at for c in coords if not c.has(_S) for n in c.free_symbols}
        names = {n.name for n in written if isinstance(n, Symbol)}
        if sizes & self.alike or names & {size.name for size in self.alike}:
            raise Declined(self._reason(value, _COUNTS))
        if any(isinstance(n, Index) and n.axis == POSITION for n in written):
            counts = "counts the positions of this shard from 0: hand the model the position ids of the whole sequence"
            raise Declined(self._reason(value, _MIXES if value.inputs() else counts))
        return [_next(asked, leaf, found) for leaf, found in at]

    def _check_plain(self, asked: Asked, length: IndexExpr) -> None:
        """A tensor that has positions is read at the position itself, others without any."""
        node = self.trace.node_of.get(asked.value)
        name = "a tensor" if node is None else user_name(node)
        if sum(c == _S for c in asked.coords) > 1:
            raise Declined(NotSpread(f"{name} has queries and keys of this shard alone"))
        for c, n in zip(asked.coords, dims(asked.value), strict=True):
            if (n == length and c != _S) or (n != length and n in self.lengths_of_all):
                what = NotSpread(f"all positions of {name} are read at each")
                raise Declined(what if asked.by is None else self._reason(asked.by, _MIXES))
            if n not in self.alike and c is not None:
                raise Declined(NotSpread(f"{name} is read at the positions of this shard, which begin at 0 on every rank"))

    def _reason(self, value: Value, what: str) -> NotSpread:
        node = value.origin or self.trace.node_of.get(value)
        if node is not None and _is_part_of_call(node):
            node = node.all_input_nodes[0]
        return NotSpread(
            f"{op_name(value) if node is None else operator_name(node)} {what}", "" if node is None else location(node)
        )


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


def _beside_loads(root: Expr) -> Iterator[Expr]:
    """What an element is computed with, but for where other elements are read."""
    pending = [root]
    while pending:
        n = pending.pop()
        yield n
        pending += () if isinstance(n, Load) else n.args


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


def _numbers(value: Value, sizes: bool) -> Iterator[IndexExpr]:
    """Those among the arguments of a call that are no constants. ``sizes``: its integers are not among them."""
    kinds = torch.SymFloat if sizes else (torch.SymFloat, torch.SymInt)
    return (x.node.expr for x in pytree.tree_leaves((value.args, dict(value.kwargs))) if isinstance(x, kinds))


def _draws(value: Value) -> bool:
    assert value.op is not None
    return torch.Tag.nondeterministic_seeded in value.op.tags


def _is_state(node: Node) -> bool:
    """Of what surrounds computations: see fuse.passes.read.graph.states."""
    return operator_name(node) in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


def _is_called(node: Node) -> bool:
    """Is it a call of a graph, as of a checkpoint?"""
    return bool(graphs_of(node)) and not is_flex(node)


def _is_part_of_call(node: Node) -> bool:
    """Of its results."""
    return operator_name(node) == "getitem" and isinstance(node.args[0], Node) and _is_called(node.args[0])


def _is_number(node: Node) -> bool:
    """A number of the program, which Dynamo hands on in a tensor."""
    return operator_name(node) == "item" and node.all_input_nodes[0].op == "placeholder"


def _is_linear(node: Node) -> bool:
    """It is not run: with a bias that would fix sizes."""
    return node.op == "call_function" and operator_name(node) == "linear" and len(node.args) >= 2


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


def _stack(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    """Of every part; along the dimension in which they stand a coordinate only chooses."""
    a = arguments(value)
    dim = a["dim"] % len(coords)
    if coords[dim].has(_S):
        return _anything(value, coords)
    return ((x, [*coords[:dim], *coords[dim + 1 :]]) for x in a["tensors"])


def _lookup(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    a = arguments(value)
    yield from ((a["weight"], [None, coords[-1]]), (a["indices"], coords[:-1]))


def _nothing(value: Value, coords: Sequence[IndexExpr]) -> Iterator[tuple[Value, Sequence[IndexExpr | None]]]:
    return iter(())


RULES: dict[str, Rule] = {
    **dict.fromkeys(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"), _nothing),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "logsumexp", "var", "var_mean", "std", "prod", "any", "all", "argmax",
         "linalg_vector_norm", "norm", "_softmax", "_log_softmax", "_safe_softmax"), _reduction,
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _row_norm),
    "embedding": _lookup,
    "stack": _stack,
}  # fmt: skip
