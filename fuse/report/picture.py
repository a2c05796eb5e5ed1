"""A mask as a picture: the predicate as data that the page evaluates, with examples of what is read from tensors.

The page knows the predicate, not the tensors: analysing a model runs nothing. What a mask reads is therefore drawn as an
example, chosen by how it is read, and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuse.ir import serial
from fuse.ir.expr import COMPARISONS, FLOATS, HALVES, Apply, Expr, Index, Load, axes, contains, symbols, walk
from fuse.ir.spec import AttentionSpec

# What templates/report/mask.js evaluates.
_FUNCTIONS = ("neg", "abs", "sign", "minimum", "maximum", "floor", "ceil", "trunc", "isnan", "isinf", "where", "cast")
EVALUATED = {"add", "sub", "mul", "div", "floordiv", "mod", "and", "or", "xor", "not", *COMPARISONS, *_FUNCTIONS}
EXAMPLES = {
    "padding": "the last quarter is padding",
    "documents": "three documents, of one half, one third and one sixth of the positions",
    "first": "where the query's document begins: there are three, of one half, one third and one sixth of the positions",
    "end": "where the query's document ends: there are three, of one half, one third and one sixth of the positions",
    "length": "three quarters of the positions",
    "start": "one eighth of the positions",
    "positions": "positions counted from 0",
    "listed": "blocks below the diagonal are full, on it partial, above it empty",
    "entries": "a pattern of blocks",
}
_ORDERED = ("lt", "le", "gt", "ge")


@dataclass(frozen=True)
class Example:
    """What stands for the tensor of an operand: ``role`` is one of EXAMPLES, ``at`` the coordinates that tell q and k, among
    ``length`` positions, a symbol. ``extreme``: whether it says what is hidden by -inf.
    """

    operand: int
    name: str
    role: str
    at: tuple[int, ...]
    length: str
    extreme: bool


@dataclass(frozen=True)
class Picture:
    """
    predicate  as fuse.ir.serial writes it, under the name "mask"
    sizes      values of symbols in the call, by name
    batch      batch indices that the predicate depends on
    tile       queries and keys of a tile of the kernel, or what is usual
    examples   of the tensors that are read
    """

    predicate: dict[str, Any]
    sizes: Mapping[str, int]
    batch: tuple[str, ...]
    tile: tuple[int, int]
    examples: tuple[Example, ...]


def draw(spec: AttentionSpec, sizes: Sequence[int], names: Mapping[int, str], tile: tuple[int, int]) -> Picture | str:
    """The mask of ``spec``, or why there is no picture of it; "" where there is no mask."""
    if spec.mask is None:
        return ""
    predicate = spec.mask.predicate
    if unknown := {n.op for n in walk(predicate) if isinstance(n, Apply)} - EVALUATED or _of_halves(predicate):
        return f"no picture: the page does not evaluate {', '.join(sorted(unknown))}"
    values = dict(zip(spec.symbols, sizes, strict=True))
    if missing := [name for name in symbols(predicate) if not values[name] and name not in ("q_len", "kv_len")]:
        return f"no picture: only the data tell {', '.join(missing)}"
    examples = tuple(_examples(predicate, names))
    if unlike := [e.name for e in examples if e.role not in EXAMPLES]:
        return f"no picture: there is no example of {', '.join(unlike)}"
    batch = tuple(sorted(a for a in axes(predicate) if a[0] == "b"))
    return Picture(serial.to_json({"mask": predicate}), values, batch, tile, examples)


def _of_halves(predicate: Expr) -> set[str]:
    """Operators whose results are rounded to 16 bits."""
    rounding = (n for n in walk(predicate) if isinstance(n, Apply) and n.op not in ("where", "neg", "abs"))
    return {n.op for n in rounding if n.dtype in HALVES}


def _examples(predicate: Expr, names: Mapping[int, str]) -> Iterator[Example]:
    read: dict[int, list[Load]] = {}
    for n in walk(predicate):
        if isinstance(n, Load):
            read.setdefault(n.operand, []).append(n)
    for operand, loads in read.items():
        found = {role for load in loads if (role := _role(load, predicate))}
        role = found.pop() if len(found) == 1 else ""
        at = tuple(i for i, c in enumerate(loads[0].coords) if axes(c) & {"q", "k"})
        length = "kv_len" if any("k" in axes(load) for load in loads) else "q_len"
        yield Example(operand, names.get(operand, f"operand{operand}"), role, at, length, loads[0].dtype in FLOATS)


def _role(load: Load, predicate: Expr) -> str:
    """By what the element is compared with; "" where that tells nothing."""
    varying = axes(load) & {"q", "k"}
    whole = "entries" if varying == {"q", "k"} else "padding" if varying else ""
    if load.dtype == "bool":
        return whole
    for compared, other in _compared(load, predicate):
        if load.dtype in FLOATS:
            return whole if compared.op in ("gt", "ge", "ne") and compared.operands[1] is other else ""
        if contains(other, Load) or _loads(compared) > 1:
            return "positions" if compared.op in _ORDERED else "documents"
        if not axes(other):
            return "listed" if whole == "entries" and len(load.coords) > 1 and _in_blocks(load) else whole
        if any(isinstance(n, Index) and n.axis == "k" for n in walk(other)) and compared.op in _ORDERED:
            least = (compared.op in ("le", "lt")) == (compared.operands[1] is other)
            return ("first" if least else "end") if varying else ("start" if least else "length")
    casts = (n for n in walk(predicate) if isinstance(n, Apply) and n.op == "cast" and n.dtype == "bool")
    return whole if any(n.operands[0] is load for n in casts) else ""


def _loads(e: Expr) -> int:
    return sum(isinstance(n, Load) for n in walk(e))


def _in_blocks(load: Load) -> bool:
    return any(isinstance(n, Apply) and n.op == "floordiv" for n in walk(*load.coords))


def _compared(load: Load, predicate: Expr) -> Iterator[tuple[Apply, Expr]]:
    """Comparisons of ``load``, perhaps in a sum, with the other side."""
    for n in walk(predicate):
        if isinstance(n, Apply) and n.op in COMPARISONS:
            sides = [_reads(a, load) for a in n.operands]
            if sides[0] != sides[1]:
                yield n, n.operands[sides.index(False)]


def _reads(e: Expr, load: Load) -> bool:
    """Whether ``load`` is a term of ``e``; what is read at other places is not."""
    if e is load:
        return True
    within = isinstance(e, Apply) and (e.op in ("add", "sub", "neg") or (e.op == "cast" and e.dtype not in FLOATS))
    return within and any(_reads(a, load) for a in e.args)
