"""The scalar language of attention scores.

An expression is the value of one tensor element as a function of loop indices. Nodes are interned: building the same
node twice gives the same object, so equality is identity, hashing is constant time and shared subterms stay shared.

Dtypes are PyTorch's names ("float32", "bfloat16", "int64", "bool"). Every node knows the dtype eager PyTorch gives
that value; type promotion is explicit (``cast``), so that a reader never has to guess a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

FLOATS = ("float64", "float32", "bfloat16", "float16")
HALVES = ("bfloat16", "float16")
INTS = ("int64", "int32", "int16", "int8", "uint8")
DTYPES = (*FLOATS, *INTS, "bool")

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
# Symbols of a spec that is a part of the attention of a longer sequence, the last that it has: the position of its first query,
# that of its first key, and the length of the whole. None is larger than a length
Q_START, K_START, LENGTH = PLACES = ("q_start", "k_start", "length")
_table: dict[tuple[Any, ...], Expr] = {}
_SAME: Mapping[str, str] = {}

Rewrite = Callable[[str, tuple["Expr", ...], str], "Expr | None"]
rewrites: dict[str, tuple[Rewrite, ...]] = {}
"""By operator, what may be put in the place of a new node; fuse.ir.rules fills it."""


class _Interned(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        node = super().__call__(*args, **kwargs)
        # repr tells 1 from True, 0.0 from -0.0, and finds NaN equal to itself
        key = (cls, *(repr(v) if isinstance(v, (int, float)) else v for v in (getattr(node, f.name) for f in fields(node))))
        return _table.setdefault(key, node)


@dataclass(frozen=True, eq=False)
class Expr(metaclass=_Interned):
    dtype: str

    @property
    def args(self) -> tuple[Expr, ...]:
        return ()

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        """This node with other operands."""
        return self

    def __str__(self) -> str:
        from fuse.ir.text import to_text  # which reads expressions

        return to_text(self)


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """A literal. Floats may be infinite or NaN."""

    value: float | int | bool


@dataclass(frozen=True, eq=False)
class Index(Expr):
    """A loop index, int64: "q", "k" (key position), "d" (qk feature), "e" (v feature), "b0", "b1", … (batch)."""

    axis: str


@dataclass(frozen=True, eq=False)
class Symbol(Expr):
    """An int64 given at run time: "B0", "B1", … (batch sizes), "q_len", "kv_len", or a named extra."""

    name: str


@dataclass(frozen=True, eq=False)
class Score(Expr):
    """sum over d of query[b, q, d] * key[b, k, d], unscaled; ``dtype`` is what eager's matmul returns."""


@dataclass(frozen=True, eq=False)
class Prob(Expr):
    """The normalised softmax weight of (b, q, k); ``dtype`` is what eager's softmax returns."""


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """Element ``coords`` of operand number ``operand``; one int64 expression per dimension of that operand."""

    operand: int
    coords: tuple[Expr, ...]

    @property
    def args(self) -> tuple[Expr, ...]:
        return self.coords

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        return Load(self.dtype, self.operand, args)


@dataclass(frozen=True, eq=False)
class Apply(Expr):
    """``op`` of fuse.ir.operators; "cast" converts to ``dtype``."""

    op: str
    operands: tuple[Expr, ...]

    @property
    def args(self) -> tuple[Expr, ...]:
        return self.operands

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        return apply(self.op, *args, dtype=self.dtype)


# ---------------------------------------------------------------------------------------------------- construction


def const(value: float | int | bool, dtype: str = "int64") -> Const:
    if dtype in FLOATS:
        value = float(value)
    elif dtype == "bool":
        value = bool(value)
    else:
        value = int(value)
    return Const(dtype, value)


def index(axis: str) -> Index:
    return Index("int64", axis)


def symbol(name: str) -> Symbol:
    return Symbol("int64", name)


def apply(op: str, *args: Expr, dtype: str) -> Expr:
    """The node ``op(*args)``, or what the first of the rules that fits gives for it (fuse.ir.rules)."""
    for rewrite in rewrites[op]:
        if (found := rewrite(op, args, dtype)) is not None:
            return found
    return Apply(dtype, op, args)


def op(name: str, *args: Expr | float) -> Expr:
    """``apply`` to operands of one dtype, which numbers take, too."""
    dtype = next(a.dtype for a in args if isinstance(a, Expr))
    nodes = [a if isinstance(a, Expr) else const(a, dtype) for a in args]
    return apply(name, *nodes, dtype="bool" if name in COMPARISONS else dtype)


def rounded(value: float, dtype: str) -> float:
    """``value`` as a tensor of the float ``dtype`` holds it."""
    import torch  # the one authority on how a Python number rounds to a dtype

    result: float = torch.tensor(value, dtype=torch.float64).to(getattr(torch, dtype)).item()
    return result


# ------------------------------------------------------------------------------------------------------- traversal


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every distinct node below ``roots``, operands before users."""
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))


def rewrite(root: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Bottom up: each node is rebuilt from its rewritten operands, then ``rule`` may replace it (None keeps it)."""
    new: dict[Expr, Expr] = {}
    for node in walk(root):
        built = node.with_args(tuple(new[a] for a in node.args)) if node.args else node
        new[node] = rule(built) or built
    return new[root]


def substitute(root: Expr, table: Mapping[Expr, Expr]) -> Expr:
    return rewrite(root, table.get)


def renumbered(
    roots: Sequence[Expr], axes: Mapping[str, str] = _SAME, symbols: Mapping[str, str] = _SAME
) -> tuple[list[Expr], tuple[int, ...]]:
    """``roots`` with the operands that they read numbered from 0 on, and what the numbers of these were, in their order.

    axes, symbols  other names of loop indices and symbols; names that a mapping lacks stay
    """
    read = operands(*roots)
    numbers = {old: new for new, old in enumerate(read)}

    def rule(n: Expr) -> Expr | None:
        if isinstance(n, Index):
            return index(axes.get(n.axis, n.axis))
        if isinstance(n, Load):
            return Load(n.dtype, numbers[n.operand], n.coords)
        return symbol(symbols.get(n.name, n.name)) if isinstance(n, Symbol) else None

    return [rewrite(root, rule) for root in roots], read


def axes(root: Expr) -> frozenset[str]:
    """The loop indices ``root`` depends on."""
    return frozenset(n.axis for n in walk(root) if isinstance(n, Index))


def symbols(*roots: Expr) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n.name for n in walk(*roots) if isinstance(n, Symbol)))


def operands(*roots: Expr) -> tuple[int, ...]:
    return tuple(sorted({n.operand for n in walk(*roots) if isinstance(n, Load)}))


def contains(root: Expr, kind: type[Expr]) -> bool:
    return any(isinstance(n, kind) for n in walk(root))
