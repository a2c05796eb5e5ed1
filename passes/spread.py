"""A site whose sequence lies on several ranks: attention of a shard's queries as a part of that of the whole.

A shard is a substitution. Where the spec computes with positions, query q becomes q + q_start, key k becomes k + k_start, and
the length that of the whole; what is read at a position stays where it is, in the tensor of the rank that has it. So every mask
that can be read is that of the whole sequence. It takes a length that is a symbol in the graph: a number could not be told from
any other that happens to be equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import sympy
from torch import Tensor

from fuse.ir import expr
from fuse.ir.bounded import bounds_of
from fuse.ir.expr import K_START, LENGTH, PLACES, Q_START, Const, Expr, Index, Load, Symbol, apply, index, symbol
from fuse.ir.index import IndexExpr, size_symbol
from fuse.ir.interval import anywhere, in_call, range_of
from fuse.ir.spec import Operand
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.read.elements import dims, spec_reader
from fuse.passes.read.graph import location, user_name
from fuse.passes.read.trace import Seed, Value, as_size, computed, size_hint
from fuse.report.reasons import Declined, NotSpread

_POSITIONS = {"q": Q_START, "k": K_START}
_FIXED = (
    "its length is {length} in the graph, a number as any other. Call the model on shards that fuse.shard_sequence has made, "
    "or compile it with dynamic=True; if it is a number all the same, something in the model asks for its value"
)


def spread(lifted: Lifted, context: SiteContext) -> Lifted:
    """The site as a part of the attention of all ranks, if ``context`` has a plan for it. Raises Declined."""
    if context.plan is None:
        return lifted
    if any(isinstance(leaf, Seed) for leaf in lifted.leaves):
        raise Declined(NotSpread("random numbers are drawn in it: set its dropout to 0"))
    length = _length(lifted)
    lifted = _by_text(lifted, length)
    spread = _Spread(lifted, context, length)
    spec = lifted.spec.mapped(spread.expression)
    operands = tuple(Operand(len(v.shape), v.dtype) for v in spread.leaves)
    spec = replace(spec, operands=operands, extra=(*spec.extra, *PLACES))
    places = {axis: tuple((i, d) for i, (a, d) in spread.places.items() if a == axis) for axis in _POSITIONS}
    plan = replace(context.plan, queries=places["q"], keys=places["k"])
    return replace(
        lifted, spec=spec, leaves=tuple(spread.leaves), sizes=(*lifted.sizes, 0 * length, 0 * length, length), plan=plan
    )


def _length(lifted: Lifted) -> IndexExpr:
    """Of the shard. Raises Declined where queries and keys are not both the positions of one sequence."""
    batch = lifted.spec.batch
    *others, length, keys = lifted.sizes[: batch + 2]
    if length.is_Integer and length == keys:
        raise Declined(NotSpread(_FIXED.format(length=length)))
    if not length.is_Symbol or length != keys:
        raise Declined(NotSpread(f"its {length} queries and {keys} keys are not the positions of one sequence"))
    if length in others:
        raise Declined(NotSpread("the length of the sequence and a size of the batch are one symbol: make them differ, once"))
    return length


def _by_text(lifted: Lifted, length: IndexExpr) -> Lifted:
    """Tensors that have the positions of all texts in one dimension, as the rows of a product, with a dimension for each."""
    rows = {i: found for i, leaf in enumerate(lifted.leaves) if (found := _rows(leaf, length))}
    if not rows:
        return lifted
    reader, own = spec_reader(lifted.spec), size_symbol("q_len")
    for axis in _POSITIONS:
        reader.space.add(axis, own)

    def split(c: Expr) -> tuple[Expr, Expr]:
        at = reader.index(c).subs(size_symbol("kv_len"), own)
        return reader.expression(reader.space.floordiv(at, own)), reader.expression(reader.space.mod(at, own))

    def rule(n: Expr) -> Expr | None:
        if not (isinstance(n, Load) and n.operand in rows):
            return None
        parts = (split(c) if d in rows[n.operand] else (c,) for d, c in enumerate(n.coords))
        return Load(n.dtype, n.operand, tuple(c for part in parts for c in part))

    leaves = tuple(_with_texts(leaf, rows[i], length) if i in rows else leaf for i, leaf in enumerate(lifted.leaves))
    operands = tuple(Operand(len(v.shape), v.dtype) for v in leaves)
    spec = replace(lifted.spec.mapped(lambda root: expr.rewrite(root, rule)), operands=operands)
    return replace(lifted, spec=spec, leaves=leaves)


def _rows(leaf: Value, length: IndexExpr) -> dict[int, IndexExpr]:
    """By dimension, how many texts lie in it one behind another."""
    found = {d: sympy.cancel(n / length) for d, n in enumerate(dims(leaf)) if n != length}
    return {d: n for d, n in found.items() if n.is_Symbol or (n.is_Integer and n > 1)}


def _with_texts(leaf: Value, rows: Mapping[int, IndexExpr], length: IndexExpr) -> Value:
    def view(x: Tensor) -> Tensor:
        for d, texts in sorted(rows.items(), reverse=True):
            x = x.unflatten(d, [as_size(texts, leaf), as_size(length, leaf)])
        return x

    return computed([leaf], view)


@dataclass
class _Spread:
    """Rewrites a spec.

    leaves  the tensors behind the operands of the new spec
    places  operand → axis, "q" or "k", and the dimension of its positions
    """

    lifted: Lifted
    context: SiteContext
    length: IndexExpr
    leaves: list[Value] = field(default_factory=list)
    places: dict[int, tuple[str, int]] = field(default_factory=dict)
    _numbers: dict[object, int] = field(default_factory=dict)

    def expression(self, root: Expr) -> Expr:
        """In terms of positions of the whole sequence."""
        new: dict[Expr, Expr] = {}
        for node in expr.walk(root):
            if isinstance(node, Load):
                new[node] = self._load(node, new)
            elif isinstance(node, Index) and node.axis in _POSITIONS:
                new[node] = apply("add", node, symbol(_POSITIONS[node.axis]), dtype="int64")
            elif isinstance(node, Symbol) and node.name in ("q_len", "kv_len"):
                new[node] = symbol(LENGTH)
            else:
                new[node] = node.with_args(tuple(new[a] for a in node.args)) if node.args else node
        return new[root]

    def _load(self, load: Load, new: Mapping[Expr, Expr]) -> Load:
        leaf = self.lifted.leaves[load.operand]
        positions = [d for d, n in enumerate(dims(leaf)) if n == self.length or self._is_as_long(leaf, d, load.coords[d])]
        read = [d for d in positions if not isinstance(load.coords[d], Const)]
        if len(read) > 1:
            raise Declined(self._reason(leaf, "has queries and keys of this shard alone: compute it of positions"))
        for d in read:
            if load.coords[d] not in (index("q"), index("k")):
                raise Declined(self._reason(leaf, f"is read at position {load.coords[d]}"))
        if len(read) < len(positions):
            raise Declined(self._reason(leaf, "is read at one position for all"))
        for d, c in enumerate(load.coords):
            if d not in read and expr.axes(c) & _POSITIONS.keys():
                self._check_table(leaf, d, new[c])
        place = next(((load.coords[d].axis, d) for d in read), None)  # type: ignore[attr-defined]
        starts = self._narrowed(load, leaf) if place is not None and place[0] == "k" else {}
        coords = tuple(
            load.coords[d] if d in read else self._less(c, starts[d][0]) if d in starts else new[c]
            for d, c in enumerate(load.coords)
        )
        return Load(load.dtype, self._operand(leaf, place, starts), coords)

    def _is_as_long(self, leaf: Value, d: int, at: Expr) -> bool:
        """Is a dimension that is read at the position as long as the shard, though nothing in the graph says so? Functions that
        FlexAttention is given read tensors so. Each call is checked for it: see fuse.parallel.call."""
        n = dims(leaf)[d]
        return n.is_Symbol and at in (index("q"), index("k")) and size_hint(n, leaf) == size_hint(self.length, leaf)

    def _operand(self, leaf: Value, place: tuple[str, int] | None, ranges: Mapping[int, tuple[int, int]]) -> int:
        key = (leaf, place, tuple(sorted(ranges.items())))
        if key not in self._numbers:
            self._numbers[key] = number = len(self.leaves)
            self.leaves.append(computed([leaf], lambda x: _cut(x, ranges)) if ranges else leaf)
            if place is not None:
                self.places[number] = place
        return self._numbers[key]

    def _check_table(self, leaf: Value, d: int, coordinate: Expr) -> None:
        """A table that is read by position has to have a place for every position of the whole sequence."""
        size, found = dims(leaf)[d], bounds_of(coordinate, anywhere)
        if not (size.is_Integer and found.low >= 0 and found.high < int(size)):
            raise Declined(self._reason(leaf, f"is a table of {size}, which may be too few for the whole sequence"))

    def _narrowed(self, load: Load, leaf: Value) -> dict[int, tuple[int, int]]:
        """By dimension, the range that is read of it where that is not all: the rest need not travel."""
        spec, found = self.lifted.spec, dict[int, tuple[int, int]]()
        known = {s: int(n) for s, n in zip(spec.symbols, self.lifted.sizes, strict=True) if n.is_Integer}
        for d, (c, n) in enumerate(zip(load.coords, dims(leaf), strict=True)):
            axes_known = all(a in ("d", "e") or f"B{a[1:]}" in known for a in expr.axes(c))
            if not n.is_Integer or not axes_known or not set(expr.symbols(c)) <= known.keys() or _loads(c):
                continue
            read = range_of(c, in_call(known, {"d": spec.qk_dim, "e": spec.v_dim}))
            if read.low >= 0 and read.high < int(n) and read.high - read.low + 1 < int(n):
                found[d] = int(read.low), int(read.high) + 1
        return found

    def _less(self, c: Expr, n: int) -> Expr:
        """A coordinate without positions in it."""
        spec, reader = self.lifted.spec, spec_reader(self.lifted.spec)
        for axis, size in (("d", spec.qk_dim), ("e", spec.v_dim)):
            reader.space.add(axis, size)
        return c if n == 0 else reader.expression(reader.index(c) - n)

    def _reason(self, leaf: Value, what: str) -> NotSpread:
        node = self.context.trace.node_of.get(leaf)
        name = "a tensor that it reads" if node is None else user_name(node)
        return NotSpread(f"{name} {what}", "" if node is None else location(node))


def _cut(x: Tensor, ranges: Mapping[int, tuple[int, int]]) -> Tensor:
    for d, (start, stop) in ranges.items():
        x = x.narrow(d, start, stop - start)
    return x


def _loads(e: Expr) -> bool:
    return any(isinstance(n, Load) for n in expr.walk(e))
