"""Whether a tile is empty, full or partial: its predicate in interval arithmetic, as C++.

Every value of the predicate becomes a range that holds all that it takes on the tile, every truth value what it can and
must be (Moore, Interval Analysis, 1966, and Kleene's three-valued logic). Values of one position that are read from
tensors, such as documents or padding, are summarised beforehand: those of keys once for each tile of keys, those of
queries once for each block. The types are those of ``templates/cpp/ranges.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fuse.codegen.cpp import C_TYPES, Writer, infix_or_call, kind_of, scalar_function
from fuse.expr import COMPARISONS, INTS, Apply, Expr, Index, Load, axes, contains

_TYPES = {"real": "RealRange", "long": "IntRange", "bool": "Truth"}
_LOGIC = ("and", "or", "xor", "not", "eq", "ne")
_INTEGER = ("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "floordiv", "mod")
# Monotone in each operand, under rounding too; minimum and maximum also hand on NaN, as ranges of reals do.
_REAL = ("add", "sub", "neg", "minimum", "maximum")


@dataclass(frozen=True)
class Summary:
    """A value of one position: ``text`` is the body of a function of (c, s, q) or (c, s, k), of type ``ctype``."""

    name: str
    ctype: str
    range_type: str
    text: str


@dataclass
class Ranges:
    """What ``bounds.h.jinja`` needs to classify tiles.

    keys, rows  values that are summarised over a tile of keys and over a block of queries
    lines       statements that compute the predicate's ``result``, of type Truth, from ``rows``, ``keys``, ``q`` and ``k``
    """

    keys: list[Summary] = field(default_factory=list)
    rows: list[Summary] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    result: str = "Truth{}"


def ranges_of(predicate: Expr, site: Callable[[], Writer], count: list[int]) -> Ranges:
    """``site`` gives a writer of values that are the same for the whole tile."""
    writer = _RangeWriter(site(), count)
    writer.found.result = writer.range(predicate)
    return writer.found


class _RangeWriter:
    def __init__(self, site: Writer, count: list[int]) -> None:
        self.found = Ranges()
        self._site = site
        self._count = count
        self._known: dict[Expr, str] = {}

    def range(self, node: Expr) -> str:
        """The name of a range that holds every value of ``node`` on the tile."""
        if node not in self._known:
            self._known[node] = self._written(node)
        return self._known[node]

    def _written(self, node: Expr) -> str:
        ctype = _TYPES[kind_of(node, False)]
        varying = axes(node) & {"q", "k"}
        if not varying:
            return f"{ctype}({self._site.value(node).text})"
        if isinstance(node, Index):
            return node.axis
        if len(varying) == 1 and contains(node, Load):
            return self._summary(node, "k" in varying, ctype)
        combined = self._combined(node) if isinstance(node, Apply) else None
        if combined is None and len(varying) == 1:
            return self._summary(node, "k" in varying, ctype)
        return self._define(ctype, combined or f"{ctype}::any()")

    def _combined(self, node: Apply) -> str | None:
        """An operation on ranges; None where there is none that is known to hold its values."""
        kinds = {a.dtype for a in node.operands}
        if node.op == "where":
            return f"choose({', '.join(map(self.range, node.operands))})"
        if node.op == "cast":
            return self._cast(node)
        if node.op in COMPARISONS and not kinds & {"bfloat16", "float16"}:
            return infix_or_call(node.op, [self.range(a) for a in node.operands])
        if node.dtype == "bool":
            return infix_or_call(node.op, [self.range(a) for a in node.operands]) if node.op in _LOGIC else None
        if node.op in (_INTEGER if node.dtype == "int64" else _REAL if node.dtype in ("float32", "float64") else ()):
            return infix_or_call(node.op, [self.range(a) for a in node.operands])
        return None

    def _cast(self, node: Apply) -> str | None:
        source = node.operands[0]
        if source.dtype in INTS and node.dtype in INTS:
            return f"{self.range(source)}.as<{C_TYPES[node.dtype]}>()"
        if source.dtype in (*INTS, "bool") and node.dtype in ("float32", "float64"):
            return f"RealRange({self.range(source)})"
        if source.dtype == "bool" and node.dtype in INTS:
            return f"IntRange({self.range(source)})"
        return f"{self.range(source)} != IntRange(0)" if node.dtype == "bool" and source.dtype in INTS else None

    def _summary(self, node: Expr, of_keys: bool, range_type: str) -> str:
        name = self._name()
        text = scalar_function(lambda w: w.value(node).text, self._count)
        ctype = {"RealRange": "R", "IntRange": "int64_t", "Truth": "bool"}[range_type]
        (self.found.keys if of_keys else self.found.rows).append(Summary(name, ctype, range_type, text))
        return f"{'keys' if of_keys else 'rows'}.{name}"

    def _define(self, ctype: str, text: str) -> str:
        name = self._name()
        self.found.lines.append(f"const {ctype} {name} = {text};")
        return name

    def _name(self) -> str:
        self._count[0] += 1
        return f"x{self._count[0]}"
