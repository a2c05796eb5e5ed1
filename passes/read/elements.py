"""One element of a traced tensor as an expression of its coordinates.

``Reader.element(value, coords)`` pulls backwards through views, pointwise operations and factories until it meets tensors
that have to be loaded, or reductions and products, which stay as Opaque nodes for ``lift`` to recognise.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from fuse.ir import expr
from fuse.ir.expr import INTS, PLACES, Apply, Const, Expr, Load, Symbol, apply, const
from fuse.ir.index import IndexExpr, Space, linear, place_symbol, size_symbol
from fuse.ir.interval import MAX_LENGTH, WHOLE, Range, point, range_of
from fuse.ir.spec import AttentionSpec
from fuse.passes.read.graph import VIEWS
from fuse.passes.read.trace import Value, computed_again
from fuse.report.reasons import Declined, RandomNumbers, UnsupportedShape
from fuse.torch_private import decomposition_table, schema

PRODUCTS = {"bmm", "mm", "baddbmm", "addmm"}
REDUCTIONS = {"sum", "amax", "max", "logsumexp", "_softmax", "_log_softmax", "_safe_softmax"}

_INTEGER_FUNCTIONS = {
    "FloorDiv": "floordiv", "CleanDiv": "floordiv", "PythonMod": "mod", "Mod": "mod", "Max": "maximum", "Min": "minimum",
}  # fmt: skip
POLYNOMIAL: dict[str, Callable[..., IndexExpr]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Opaque(Expr):
    """Element ``coords`` of a product or reduction that has not been looked into."""

    value: Value
    coords: tuple[Expr, ...]

    @property
    def args(self) -> tuple[Expr, ...]:
        return self.coords

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        return Opaque(self.dtype, self.value, args)

    @property
    def name(self) -> str:
        return op_name(self.value)


class Stopped(Opaque):
    """An element through which no gradient flows, though what it is made of wants one: it is not looked into either."""

    @property
    def name(self) -> str:
        return "detach"

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        return Stopped(self.dtype, self.value, args)


Coords = tuple[IndexExpr, ...]
Handler = Callable[["Reader", Value, Coords], Expr]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers how an element of these ATen operations is read."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def op_name(value: Value) -> str:
    return "" if value.op is None else schema(value.op).name.removeprefix("aten::")


def dims(value: Value) -> tuple[IndexExpr, ...]:
    return tuple(as_index(n) for n in value.shape)


def as_index(n: Any) -> IndexExpr:
    """An int or SymInt as sympy."""
    return n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(int(n))


def arguments(value: Value) -> dict[str, Any]:
    """The arguments of the call by name, defaults filled in."""
    assert value.op is not None
    declared = schema(value.op).arguments
    given = dict(zip((a.name for a in declared), value.args, strict=False)) | dict(value.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in declared}


@dataclass
class Reader:
    """Shared by all that is read for one site: loop indices in scope, leaves found, and what was read before.

    leaves    the tensors that are loaded; Load.operand counts them
    symbols   sizes by name, with what is known of their sign
    inner     the loop indices of the kernel's inner loops, once they are known: q, k, d, e
    held      values that the graph has a node for
    stops     values at which gradients end; none where no gradient is wanted
    seeds     values of random numbers, with what they are functions of
    rising    leaves of one dimension whose elements never decrease along it
    """

    space: Space = field(default_factory=Space)
    leaves: list[Value] = field(default_factory=list)
    symbols: dict[str, sympy.Symbol] = field(default_factory=dict)
    inner: set[sympy.Symbol] = field(default_factory=set)
    held: Container[Value] = ()
    stops: Container[Value] = ()
    seeds: dict[Value, Value] = field(default_factory=dict)
    rising: Set[int] = frozenset()
    views_only: bool = False
    _simpler: dict[Value, Value | None] = field(default_factory=dict)
    _atoms: dict[Expr, sympy.Symbol] = field(default_factory=dict)
    _made: dict[Expr, IndexExpr] = field(default_factory=dict)
    _known: dict[tuple[Value, tuple[IndexExpr, ...], bool], Expr] = field(default_factory=dict)

    def element(self, value: Value, coords: Sequence[IndexExpr]) -> Expr:
        key = (value, tuple(coords), self.views_only)
        if key not in self._known:
            self._known[key] = self._element(value, key[1])
        return self._known[key]

    def read(self) -> Iterator[tuple[Value, tuple[IndexExpr, ...], Expr]]:
        """Every element that was read so far, the innermost first: (tensor, coordinates, expression)."""
        return ((value, coords, e) for (value, coords, views_only), e in self._known.items() if not views_only)

    def through_views(self, value: Value, coords: Sequence[IndexExpr]) -> Expr:
        """The load of the tensor behind views alone: nothing is computed, no value changes."""
        self.views_only = True
        try:
            return self.element(value, coords)
        finally:
            self.views_only = False

    def _element(self, value: Value, coords: tuple[IndexExpr, ...]) -> Expr:
        if value.literal is not None:
            return const(value.literal, value.dtype)
        if (
            value.op is None
            or self._is_written(value)
            or (self.views_only and (not _is_view(value) or self._only_view_held(value)))
        ):
            return self.load(value, coords)
        if value in self.stops:
            found = self.load if self.views_only else self._stopped
            return found(value, coords)
        return self._read(value, coords)

    def _stopped(self, value: Value, coords: Sequence[IndexExpr]) -> Expr:
        return Stopped(value.dtype, value, tuple(self.expression(c) for c in coords))

    def behind(self, e: Expr) -> Expr:
        """What a stopped element is made of: for what has no gradient in any case."""
        return self._read(e.value, tuple(self.index(c) for c in e.coords)) if isinstance(e, Stopped) else e

    def _read(self, value: Value, coords: Coords) -> Expr:
        assert value.op is not None
        name = op_name(value)
        if torch.Tag.nondeterministic_seeded in value.op.tags and name not in HANDLERS:
            raise Declined(RandomNumbers(name))
        if name in PRODUCTS or name in REDUCTIONS:
            return Opaque(value.dtype, value, tuple(self.expression(c) for c in coords))
        handler = HANDLERS.get(name)
        if handler is not None and _plain(value):
            return handler(self, value, coords)
        written_out = self._written_out(value) if handler is None else None
        return self.load(value, coords) if written_out is None else self.element(written_out, coords)

    def _written_out(self, value: Value) -> Value | None:
        """An activation, such as gelu, in the operations that torch decomposes it into; None for all else."""
        if value not in self._simpler:
            rule = decomposition_table.get(value.op) if value.op and torch.Tag.pointwise in value.op.tags else None
            made = None if rule is None else computed_again(value, rule)
            self._simpler[value] = made if made is not None and made.op is not None else None
        return self._simpler[value]

    def _only_view_held(self, value: Value) -> bool:
        """Would a step further lead to a value that the graph would have to compute a second time?"""
        base = value
        while base.op is not None and _is_view(base):
            base = base.args[0]
        return value in self.held and base.op is not None and base not in self.held

    def _is_written(self, value: Value) -> bool:
        """Is it torch.tensor([…]) of several numbers? The graph has a node for it, none for the numbers."""
        base = value
        while op_name(base) in ("detach", "lift_fresh", "lift_fresh_copy"):
            base = base.args[0]
        return value in self.held and base.op is None and base.literal is None and base not in self.held

    def load(self, value: Value, coords: Sequence[IndexExpr]) -> Expr:
        if value not in self.leaves:
            self.leaves.append(value)
        coords = [sympy.Integer(0) if n == 1 else c for c, n in zip(coords, dims(value), strict=True)]
        return Load(value.dtype, self.leaves.index(value), tuple(self.expression(c) for c in coords))

    # ------------------------------------------------------------------------------------ between sympy and Expr

    def atom(self, e: Expr) -> sympy.Symbol:
        """A sympy stand-in for an integer that is no polynomial of indices, such as one read from a tensor."""
        if e not in self._atoms:
            self._atoms[e] = sympy.Symbol(f"atom{len(self._atoms)}", integer=True)
        return self._atoms[e]

    def expression(self, e: IndexExpr) -> Expr:
        """sympy → Expr."""
        self.symbols.update({s.name: s for s in e.free_symbols if s not in self.space.sizes})
        made = index_to_expr(e, {s: x for x, s in self._atoms.items()}, self.space)
        self._made.setdefault(made, e)
        return made

    def index(self, e: Expr) -> IndexExpr:
        """Expr of an integer → sympy. What was made of sympy is that again: places in tensors, which do not wrap."""
        if e in self._made:
            return self._made[e]
        if isinstance(e, expr.Const):
            return sympy.Integer(int(e.value))
        if isinstance(e, expr.Index):
            return sympy.Symbol(e.axis, integer=True)
        if isinstance(e, expr.Symbol):
            return self.symbols.setdefault(e.name, sympy.Symbol(e.name, integer=True))
        if isinstance(e, expr.Apply) and e.dtype == "int64" and all(a.dtype == "int64" for a in e.operands):
            args = [self.index(a) for a in e.operands]
            if e.op in POLYNOMIAL and not may_wrap(e, "int64"):
                return sympy.expand(POLYNOMIAL[e.op](*args))
            if e.op == "floordiv" and args[1].is_positive:
                return self.space.floordiv(*args)
            if e.op == "mod" and args[1].is_positive:
                return self.space.mod(*args)
        if isinstance(e, expr.Apply) and e.op == "cast" and (inner := _unchanged(e)) is not None:
            return self.index(inner)
        return self.atom(e if e.dtype == "int64" else apply("cast", e, dtype="int64"))

    def gathered(self, index_value: Value, coords: Sequence[IndexExpr], size: IndexExpr, wraps: bool) -> IndexExpr:
        """A coordinate that is read from a tensor; ``wraps``: negative ones count from the end."""
        e = self.index(self.element(index_value, coords))
        if not wraps or self.space.nonnegative(e):
            return e
        x = self.expression(e)
        wrapped = apply("add", x, self.expression(size), dtype="int64")
        return self.atom(apply("where", apply("lt", x, const(0), dtype="bool"), wrapped, x, dtype="int64"))

    def clamped(self, e: IndexExpr, size: IndexExpr) -> IndexExpr:
        """e forced into [0, size), for a read that a condition around it discards when e lies outside."""
        if self.space.nonnegative(e) and self.space.nonnegative(size - 1 - e):
            return e
        x = apply("maximum", self.expression(e), const(0), dtype="int64")
        return self.atom(apply("minimum", x, self.expression(size - 1), dtype="int64"))

    def at_most(self, a: IndexExpr, b: IndexExpr) -> Expr:
        """a <= b, decided where it can be."""
        if self.space.nonnegative(b - a):
            return const(True, "bool")
        if self.space.nonnegative(a - b - 1):
            return const(False, "bool")
        return apply("le", self.expression(a), self.expression(b), dtype="bool")

    def reads_fixed_strides(self, coords: Sequence[IndexExpr]) -> bool:
        """Can these coordinates be walked along every inner loop index with constant steps?"""
        return all(linear(c, x) is not None for c in coords for x in self.inner)


def spec_reader(spec: AttentionSpec, rising: Set[int] = frozenset()) -> Reader:
    """For index algebra on the expressions of a spec: its batch indices, q and k, and their sizes; ``rising``: see Reader."""
    space = Space()
    for axis, name in [(f"b{i}", f"B{i}") for i in range(spec.batch)] + [("q", "q_len"), ("k", "kv_len")]:
        space.add(axis, size_symbol(name))
    symbols = {s.name: s for n in space.sizes.values() for s in n.free_symbols} | {s: place_symbol(s) for s in PLACES}
    return Reader(space, symbols=symbols, rising=rising)


def index_to_expr(e: IndexExpr, atoms: dict[sympy.Symbol, Expr], space: Space) -> Expr:
    def convert(e: IndexExpr) -> Expr:
        if e.is_Integer:
            return const(int(e))
        if e.is_Symbol:
            if e in atoms:
                return atoms[e]
            return expr.index(e.name) if e in space.sizes else expr.symbol(e.name)
        if e.is_Add:
            return _sum([convert(a) for a in e.args], [a.as_coeff_Mul() for a in e.args], convert)
        if e.is_Mul or e.is_Pow:
            factors = e.args if e.is_Mul else [e.base] * int(e.exp)
            out = convert(factors[0])
            for f in factors[1:]:
                out = apply("mul", out, convert(f), dtype="int64")
            return out
        if (name := _INTEGER_FUNCTIONS.get(type(e).__name__)) is None:
            raise Declined(UnsupportedShape(f"a size of the form {e}"))
        out = convert(e.args[0])
        for x in e.args[1:]:
            out = apply(name, out, convert(x), dtype="int64")
        return out

    return convert(sympy.expand(e) if not e.is_Symbol else e)


def _sum(terms: list[Expr], parts: list[tuple[Any, IndexExpr]], convert: Callable[[IndexExpr], Expr]) -> Expr:
    """Positive terms first, so that k - q prints as such."""
    positive = [t for t, (c, _) in zip(terms, parts, strict=True) if c > 0]
    negative = [convert(-c * rest) for c, rest in parts if c < 0]
    out = positive[0] if positive else apply("neg", negative.pop(0), dtype="int64")
    for t in positive[1:]:
        out = apply("add", out, t, dtype="int64")
    for t in negative:
        out = apply("sub", out, t, dtype="int64")
    return out


def _unchanged(cast: expr.Apply) -> Expr | None:
    """The int64 that a cast leaves as it is: positions fit into int32, and pass through it on the way back to int64."""
    inner = cast.operands[0]
    if inner.dtype == "int64":
        loads = any(isinstance(n, Load) for n in expr.walk(inner))
        position = cast.dtype == "int32" and not loads and not may_wrap(inner, "int32")
        return inner if cast.dtype == "int64" or position else None
    if cast.dtype == "int64" and isinstance(inner, expr.Apply) and inner.op == "cast":
        return _unchanged(inner)
    return None


def may_wrap(e: Expr, dtype: str) -> bool:
    """Whether arithmetic of positions and sizes may leave ``dtype``: ``k * 2**58`` is negative from k = 32 on.

    What is read from tensors is not judged.
    """
    if not all(isinstance(n, (Const, expr.Index, Symbol)) or (isinstance(n, Apply) and n.dtype in INTS) for n in expr.walk(e)):
        return False
    whole, found = WHOLE[dtype], range_of(e, lambda n: point(n.value) if isinstance(n, Const) else Range(0, MAX_LENGTH))
    return not (whole.low < found.low and found.high < whole.high)


def uncast(e: Expr) -> Expr:
    """What a chain of casts between floats was given."""
    while isinstance(e, Apply) and e.op == "cast" and e.dtype in expr.FLOATS and e.operands[0].dtype in expr.FLOATS:
        e = e.operands[0]
    return e


def summed_into(score: Expr) -> list[Opaque]:
    """The products that reach the score as numbers; those that only decide a condition belong to its mask."""
    seen: dict[Expr, None] = {}
    stack = [score]
    while stack:
        node = stack.pop()
        if node not in seen and node.dtype != "bool":
            seen[node] = None
            stack.extend(node.args)
    return [n for n in seen if isinstance(n, Opaque)]


def has_opaque(e: Expr) -> bool:
    return any(isinstance(n, Opaque) for n in expr.walk(e))


def _plain(value: Value) -> bool:
    """Dense tensors of dtypes that expressions know."""
    return value.dtype in expr.DTYPES and value.meta.layout == torch.strided


def _is_view(value: Value) -> bool:
    if op_name(value) == "_to_copy":  # a product of widened operands may read the narrow ones: the same numbers
        widened = {"bfloat16": ("float32", "float64"), "float16": ("float32", "float64"), "float32": ("float64",)}
        return value.dtype in (*widened.get(value.args[0].dtype, ()), value.args[0].dtype)
    return op_name(value) in VIEWS
