"""Expressions as Triton: every value has the shape of what it depends on, and broadcasting does the rest.

A value is computed once per program (batch index), once per block of queries (a column), or once per tile (a row of keys,
or all its entries). Index arithmetic is in 32 bits where that is proved to suffice, offsets into tensors are in 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fuse.ir.expr import COMPARISONS, FLOATS, HALVES, Apply, Const, Expr, Index, Load, Prob, Score, Symbol, axes, contains
from fuse.ir.interval import anywhere, range_of
from fuse.ir.operators import OPERATORS
from fuse.ir.roundings import as_taken, decides, is_read
from fuse.kernel.rectangles import Rows

_WORD = 2**31 - 1


@dataclass
class Block:
    """Statements, and the names of the values that they define."""

    lines: list[str] = field(default_factory=list)
    known: dict[tuple[Expr, bool], str] = field(default_factory=dict)


@dataclass
class TritonWriter:
    """Writes values into the blocks that ``place`` chooses by the indices they depend on.

    real      "tl.float32" or "tl.float64": the type of all floats
    as_eager  round every value to its dtype, as eager does after every operation; what decides something always is
    leaves    texts of nodes that are there already
    names     variables of indices, where they have other names
    drawn     how random numbers are drawn whose columns are the keys of a tile: a call that lacks its first three arguments
    """

    place: Callable[[frozenset[str]], Block]
    real: str
    count: list[int]
    as_eager: bool = False
    leaves: dict[Expr, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    drawn: str = ""

    def value(self, node: Expr, as_eager: bool = False) -> str:
        """``as_eager``: rounded as eager rounds it, and all that it is computed of."""
        as_eager = as_eager or self.as_eager
        if node in self.leaves and not (as_eager and isinstance(node, Score)):
            return self.leaves[node]
        if isinstance(node, Const):
            return _literal(node)
        if isinstance(node, Symbol):
            return node.name
        if isinstance(node, Index):
            return self.names.get(node.axis, node.axis)
        block = self.place(depends(node))
        key = (node, as_eager and node.dtype in FLOATS and not is_read(node))
        if key not in block.known:
            text = self._text(node, as_eager)
            block.known[key] = self._define(block, self._rounded(text, node.dtype) if key[1] else text)
        return block.known[key]

    def _text(self, node: Expr, as_eager: bool) -> str:
        if node in self.leaves:
            return self.leaves[node]
        return self.load(node) if isinstance(node, Load) else self._apply(node, as_eager or decides(node))

    def _rounded(self, text: str, dtype: str) -> str:
        """Halves are rounded to float32 first, which is what eager computes them in."""
        narrower = dict.fromkeys(_type(name) for name in ("float32", dtype)) if dtype != "float64" else {}
        steps = [name for name in narrower if name != self.real]
        for name in (*steps, self.real) if steps else ():
            text = f"tl.cast({text}, {name})"
        return text

    def _define(self, block: Block, text: str) -> str:
        self.count[0] += 1
        name = f"x{self.count[0]}"
        block.lines.append(f"{name} = {text}")
        return name

    # ------------------------------------------------------------------------------------------------------- loads

    def load(self, node: Load, cast: bool = True) -> str:
        """A read; what a coordinate that is no plain index points at is held inside the operand."""
        return self.read(node, f"p{node.operand} + {self.offset(node)}", self.guards(node), cast)

    def guards(self, node: Load) -> list[str]:
        """Conditions under which the plain indices of a read lie inside the operand."""
        plain = {self.value(c) for c in node.coords if isinstance(c, Index) and c.axis in ("q", "k", "d", "e")}
        return [f"{axis}_ok" for axis in sorted(plain)]

    def read(self, node: Load, pointer: str, guards: list[str], cast: bool = True) -> str:
        text = f"tl.load({pointer}, mask={' & '.join(guards)}, other=0)" if guards else f"tl.load({pointer})"
        if node.dtype == "bool":
            return f"{text} != 0"
        if not cast:
            return text
        return f"tl.cast({text}, {self.real if node.dtype in FLOATS else 'tl.int64' if node.dtype == 'int64' else 'tl.int32'})"

    def tile(self, node: Load, pointer: str, size: str, guards: list[str], cast: bool) -> str:
        """A tile of query, key or value, ``size``: products take whole ones. One of a single position or feature, whose
        coordinates leave that out, is there once, and nothing beyond it."""
        whole = len(axes(node) & {"q", "k", "d", "e"}) == 2
        return self.read(node, pointer if whole else f"tl.broadcast_to({pointer}, [{size}])", guards, cast)

    def offset(self, node: Load, strides: str | None = None) -> str:
        """Position of the element in its operand; ``strides``: what names begin with that are those of another such tensor."""
        terms = []
        for dim in range(len(node.coords)):
            terms.append(f"tl.cast({self.coordinate(node, dim)}, tl.int64) * {strides or f's{node.operand}'}_{dim}")
        return " + ".join(terms) or "0"

    def coordinate(self, node: Load, dim: int) -> str:
        text = self.value(node.coords[dim])
        if isinstance(node.coords[dim], (Const, Index)):
            return text
        return f"tl.minimum(tl.maximum({text}, 0), n{node.operand}_{dim} - 1)"

    def copied(self, node: Load, rows: Rows, name: str, width: int) -> str:
        """A tile of "query", "key" or "value" by its tensor descriptor, NAME_rows."""
        start, size = ("q0", "BM") if name == "query" else ("k0", "BN")
        corner = [*(self.coordinate(node, dim) for dim in rows.places), start]
        places = ", ".join(f"tl.cast({place}, tl.int32)" for place in corner)
        first = "0" if rows.apart else f"tl.cast({self.value(rows.start)}, tl.int32)"
        return f"tl.reshape({name}_rows.load([{places}, {first}]), [{size}, {width}])"

    # -------------------------------------------------------------------------------------------------- operations

    def _apply(self, node: Expr, as_eager: bool) -> str:
        """``as_eager``: of operands that are rounded as eager rounds them."""
        if not isinstance(node, Apply):
            raise ValueError(f"{node} has no value here")
        args = [self.value(a, as_eager) for a in (as_taken(node) if as_eager else node.operands)]
        op, source = node.op, node.operands[0].dtype
        if op == "cast":
            return self._cast(node, args[0])
        of_numbers = self.real == "tl.float64" and all(isinstance(a, Const) for a in node.operands[op == "where" :])
        if op == "where":
            chosen = map(self._scalar, args[1:]) if of_numbers and node.dtype in FLOATS else args[1:]
            return f"tl.where({', '.join((args[0], *chosen))})"
        if op == "not":
            return f"{args[0]} == 0" if source == "bool" else f"~{args[0]}"
        if source not in (*FLOATS, "bool"):
            args = self._widened(node, args)
        elif of_numbers:
            args = [self._scalar(a) for a in args]  # of numbers alone Triton computes in float32
        elif op == "pow" and isinstance(node.operands[0], Const):
            args[0] = self._scalar(args[0])  # libdevice takes no number first
        if op == "uniform":
            return f"tl.cast({self._uniform(node, args)}, {self.real})"
        if op == "tanh" and node.dtype in HALVES and self.real == "tl.float32" and not as_eager:
            return f"f_tanh_half({args[0]})"
        row = OPERATORS[op]
        return (row.triton_real if row.triton_real and source in FLOATS else row.triton).format(*args)

    def _scalar(self, number: str) -> str:
        return f"tl.full([], {number}, {self.real})"

    def _uniform(self, node: Apply, args: list[str]) -> str:
        _, plane, row, column = node.operands
        of_keys = isinstance(column, Index) and column.axis == "k" and not depends(plane) & {"q", "k"}
        if self.drawn and of_keys and depends(row) & {"q", "k"} == {"q"}:
            return self.drawn.format(", ".join(args[:3]))
        return f"f_uniform({', '.join(args)})"

    def _widened(self, node: Apply, args: list[str]) -> list[str]:
        """Operands of integer arithmetic in 64 bits, unless every value is known to fit 32."""
        if all(map(fits_a_word, node.operands if node.op in COMPARISONS else (node, *node.operands))):
            return args
        return [f"tl.cast({a}, tl.int64)" for a in args]

    def _cast(self, node: Apply, arg: str) -> str:
        source, target = node.operands[0].dtype, node.dtype
        if target in FLOATS:
            return arg if source in FLOATS else f"tl.cast({arg}, {self.real})"
        if target == "bool":
            return f"{arg} != 0"
        return f"tl.cast({arg}, {_type(target)})"


def fits_a_word(node: Expr) -> bool:
    """Whether every value of an integer is known to fit 32 bits."""
    found = range_of(node, anywhere)
    return bool(found.low >= -_WORD and found.high <= _WORD)


def depends(node: Expr) -> frozenset[str]:
    return axes(node) | ({"q", "k"} if contains(node, Score) or contains(node, Prob) else frozenset())


def _type(dtype: str) -> str:
    return f"tl.{dtype}"


def _literal(node: Const) -> str:
    if node.dtype not in FLOATS:
        return str(node.value)
    if math.isfinite(node.value):
        return repr(float(node.value))
    return f'float("{node.value}")'
