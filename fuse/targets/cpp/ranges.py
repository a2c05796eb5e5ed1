"""Interval arithmetic on tiles as C++, with the types of ``templates/cpp/prelude/ranges.h``.

What is read of one position is summarised beforehand: values of keys once for each tile of keys, those of queries once for
each block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fuse.ir.expr import FLOATS, INTS, Apply, Expr, Index, Load
from fuse.ir.operators import OPERATORS
from fuse.ir.roundings import as_taken
from fuse.kernel.ranges import RangeWriter, is_narrowing
from fuse.targets.cpp.write import C_TYPES, ROUND, Writer, scalar_function

_TYPES = {"real": "RealRange", "long": "IntRange", "bool": "Truth"}


@dataclass(frozen=True)
class Summary:
    """A value of positions: ``text`` is the body of a function of (c, b, q), (c, b, k) or (c, b, q, k), of type ``ctype``."""

    name: str
    ctype: str
    range_type: str
    text: str


@dataclass
class TileClassifier:
    """What ``shared/bounds.h.jinja`` needs to classify tiles.

    keys, rows  values that are summarised over a tile of keys and over a block of queries
    entries     values that are read at one place for all of a tile, functions of (c, b, q, k)
    lines       statements that compute the predicate's ``result``, of type Truth, from ``rows``, ``keys``, ``q`` and ``k``
    """

    keys: list[Summary] = field(default_factory=list)
    rows: list[Summary] = field(default_factory=list)
    entries: list[Summary] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    result: str = "Truth{}"


def _rounded(node: Apply, text: str) -> str:
    """The text of a range, rounded as the values in it are."""
    return f"{ROUND[node.dtype]}({text})" if node.dtype in FLOATS else text


def ranges_of(predicate: Expr | None, of_tile: Callable[[], Writer], count: list[int]) -> TileClassifier:
    """``of_tile`` gives a writer of values that are the same for the whole tile."""
    if predicate is None:
        return TileClassifier()
    writer = CppRanges(of_tile(), count)
    writer.found.result = writer.range(predicate)
    return writer.found


class CppRanges(RangeWriter):
    def __init__(self, of_tile: Writer, count: list[int]) -> None:
        super().__init__(count)
        self.found = TileClassifier()
        self._of_tile = of_tile

    def constant(self, node: Expr, kind: str) -> str:
        return f"{_TYPES[kind]}({self._of_tile.value(node, as_eager=True).text})"

    def position(self, node: Index) -> str:
        return node.axis

    def summary(self, node: Expr, of_keys: bool, kind: str) -> str:
        value = self._value(node, kind)
        (self.found.keys if of_keys else self.found.rows).append(value)
        return f"{'keys' if of_keys else 'rows'}.{value.name}"

    def lookup(self, node: Load, places: list[str]) -> str:
        value = self._value(node, "long")
        self.found.entries.append(value)
        near = " && ".join(f"{place}.high - {place}.low <= 1" for place in places)
        corners = [f"value_{value.name}(c, b, {q}, {k})" for q in ("q.low", "q.high") for k in ("k.low", "k.high")]
        return f"{near} ? IntRange({corners[0]}){''.join(f'.with({x})' for x in corners[1:])} : IntRange::any()"

    def _value(self, node: Expr, kind: str) -> Summary:
        text = scalar_function(lambda w: w.value(node, as_eager=True).text, self._count)
        return Summary(self.new_name(), {"real": "R", "long": "int64_t", "bool": "bool"}[kind], _TYPES[kind], text)

    def operation(self, node: Apply) -> str:
        args = [self.range(a) for a in as_taken(node)]
        return _rounded(node, f"choose({', '.join(args)})" if node.op == "where" else OPERATORS[node.op].cpp.format(*args))

    def cast(self, node: Apply) -> str | None:
        source = node.operands[0]
        if is_narrowing(node):
            return f"{self.range(source)}.as<{C_TYPES[node.dtype]}>()"
        if node.dtype in FLOATS:
            return _rounded(node, f"RealRange({self.range(source)})")
        if source.dtype == "bool" and node.dtype in INTS:
            return f"IntRange({self.range(source)})"
        return f"{self.range(source)} != IntRange(0)" if node.dtype == "bool" and source.dtype in INTS else None

    def anything(self, kind: str) -> str:
        return f"{_TYPES[kind]}::any()"

    def define(self, kind: str, text: str) -> str:
        name = self.new_name()
        self.found.lines.append(f"const {_TYPES[kind]} {name} = {text};")
        return name
