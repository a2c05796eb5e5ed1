"""Whether a tile is empty, full or partial: its predicate in interval arithmetic.

Every value of the predicate becomes a range that holds all that it takes on the tile, every truth value what it can and
must be (Moore, Interval Analysis, 1966, and Kleene's three-valued logic). Values of one position that are read from
tensors, such as documents or padding, are summarised over the tile's keys or its queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from fuse.ir.expr import COMPARISONS, FLOATS, INTS, Apply, Const, Expr, Index, Load, axes, contains

_LOGIC = ("and", "or", "xor", "not", "eq", "ne")
_INTEGER = ("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "floordiv", "mod")
# Monotone in each operand, under rounding too; minimum and maximum also hand on NaN, as ranges of reals do.
_REAL = ("add", "sub", "neg", "minimum", "maximum")


class RangeWriter(ABC):
    """Names the range of each node once; targets say how ranges are written. Kinds are "real", "long" and "bool"."""

    def __init__(self, count: list[int]) -> None:
        self._count = count
        self._known: dict[Expr, str] = {}

    @abstractmethod
    def constant(self, node: Expr, kind: str) -> str:
        """The range of what is the same for the whole tile."""

    @abstractmethod
    def position(self, node: Index) -> str:
        """The range of the tile's queries or keys."""

    @abstractmethod
    def summary(self, node: Expr, of_keys: bool, kind: str) -> str:
        """The range of what depends on one position."""

    @abstractmethod
    def lookup(self, node: Load, places: list[str]) -> str:
        """The range of an integer that is read at ``places``, the ranges of its coordinates, each a quotient of a position:
        where a tile spans no more than two of each, its corners have all values."""

    @abstractmethod
    def operation(self, node: Apply) -> str | None:
        """An operation on ranges; None where the target has none for it."""

    @abstractmethod
    def cast(self, node: Apply) -> str | None:
        """A conversion, likewise."""

    @abstractmethod
    def anything(self, kind: str) -> str:
        """The range of which nothing is known."""

    @abstractmethod
    def define(self, kind: str, text: str) -> str:
        """Writes a statement; the name of its value."""

    def range(self, node: Expr) -> str:
        """The name of a range that holds every value of ``node`` on the tile."""
        if node not in self._known:
            self._known[node] = self._written(node)
        return self._known[node]

    def new_name(self) -> str:
        self._count[0] += 1
        return f"x{self._count[0]}"

    def _written(self, node: Expr) -> str:
        kind = _kind(node)
        varying = axes(node) & {"q", "k"}
        if not varying:
            return self.constant(node, kind)
        if isinstance(node, Index):
            return self.position(node)
        if len(varying) == 1 and contains(node, Load):
            return self.summary(node, "k" in varying, kind)
        combined = self._combined(node)
        if combined is None and len(varying) == 1:
            return self.summary(node, "k" in varying, kind)
        return self.define(kind, combined or self.anything(kind))

    def _combined(self, node: Expr) -> str | None:
        """None where there is no operation that is known to hold its values."""
        if isinstance(node, Load):
            varying = [c for c in node.coords if axes(c) & {"q", "k"}]
            read = node.dtype in INTS and all(map(is_quotient, varying))
            return self.lookup(node, [self.range(c) for c in varying]) if read else None
        if not isinstance(node, Apply):
            return None
        if node.op == "cast":
            return self.cast(node)
        return self.operation(node) if _has_range(node) else None


def is_quotient(node: Expr) -> bool:
    """Whether this is a position divided by a number, as a place in a table of blocks is."""
    divides = isinstance(node, Apply) and node.op == "floordiv" and isinstance(node.operands[0], Index)
    return divides and isinstance(node.args[1], Const) and node.args[1].value > 0


def _kind(node: Expr) -> str:
    return "real" if node.dtype in FLOATS else "bool" if node.dtype == "bool" else "long"


def _has_range(node: Apply) -> bool:
    if node.op == "where":
        return True
    if node.op in COMPARISONS:
        return True
    if node.dtype == "bool":
        return node.op in _LOGIC
    return node.op in (_INTEGER if node.dtype == "int64" else _REAL if node.dtype in FLOATS else ())


def has_floats(node: Apply) -> bool:
    return any(n.dtype in FLOATS for n in (node, *node.operands))


def is_narrowing(node: Apply) -> bool:
    """Whether a cast is from integers to integers, perhaps of fewer bits."""
    return node.operands[0].dtype in INTS and node.dtype in INTS
