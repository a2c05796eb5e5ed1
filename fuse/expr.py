"""The scalar language of attention scores.

An expression is the value of one tensor element as a function of loop indices. Nodes are interned: building the same
node twice gives the same object, so equality is identity, hashing is constant time and shared subterms stay shared.

Dtypes are PyTorch's names ("float32", "bfloat16", "int64", "bool"). Every node knows the dtype eager PyTorch gives
that value; type promotion is explicit (``cast``), so that a reader never has to guess a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

FLOATS = ("float64", "float32", "bfloat16", "float16")
INTS = ("int64", "int32", "int16", "int8", "uint8")
DTYPES = (*FLOATS, *INTS, "bool")

# Elementwise operators with PyTorch's semantics (floordiv and mod round towards minus infinity), by number of operands.
UNARY = (
    "neg", "abs", "exp", "exp2", "log", "log2", "log1p", "expm1", "tanh", "sigmoid", "sqrt", "rsqrt", "reciprocal",
    "erf", "sin", "cos", "floor", "ceil", "trunc", "round", "sign", "isnan", "isinf", "not", "cast",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "div", "pow", "minimum", "maximum", "floordiv", "mod",
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor",
)  # fmt: skip
TERNARY = ("where",)
# uniform(seed, plane, row, column) is the float32 in [0, 1) that fuse.philox gives for these int64.
QUATERNARY = ("uniform",)
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
ARITY = {**dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY, 2), **dict.fromkeys(TERNARY, 3), **dict.fromkeys(QUATERNARY, 4)}

_table: dict[tuple[Any, ...], Expr] = {}


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
    """``op`` of ARITY; "cast" converts to ``dtype``."""

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
    """The node ``op(*args)``, or its value where the result is plain whatever the operands hold."""
    if op == "cast" and args[0].dtype == dtype:
        return args[0]
    if op == "where":
        return _where(args[0], args[1], args[2], dtype)
    if op in (*COMPARISONS, "cast") and (chosen := _of_choice(op, args, dtype)) is not None:
        return chosen
    if op in ("and", "or") and dtype == "bool":
        neutral = op == "and"
        for this, other in (args, args[::-1]):
            if isinstance(this, Const):
                return other if bool(this.value) == neutral else this
        if args[0] is args[1]:
            return args[0]
    if op in ("add", "mul") and dtype != "bool":
        neutral_value = 0 if op == "add" else 1
        for this, other in (args, args[::-1]):
            if isinstance(this, Const) and this.value == neutral_value:
                return other
    if op == "sub" and isinstance(args[1], Const) and args[1].value == 0:
        return args[0]
    if op == "not" and dtype == "bool" and isinstance(args[0], Apply) and args[0].op == "not":
        return args[0].operands[0]
    if all(isinstance(a, Const) for a in args):
        folded = _fold(op, tuple(a.value for a in args if isinstance(a, Const)), dtype)
        if folded is not None:
            return folded
    return Apply(dtype, op, args)


def _where(condition: Expr, a: Expr, b: Expr, dtype: str) -> Expr:
    if isinstance(condition, Const):
        return a if condition.value else b
    if a is b:
        return a
    if dtype == "bool" and isinstance(a, Const) and isinstance(b, Const):
        return condition if a.value else apply("not", condition, dtype="bool")
    return Apply(dtype, "where", (condition, a, b))


def _of_choice(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """A comparison or cast of where(c, 0, -inf) is a choice between its two values: where(c, 0, -inf) < -1 is not c."""
    choice, *rest = args
    if not (
        isinstance(choice, Apply) and choice.op == "where" and all(isinstance(x, Const) for x in (*choice.operands[1:], *rest))
    ):
        return None
    values = [_fold(op, tuple(x.value for x in (v, *rest) if isinstance(x, Const)), dtype) for v in choice.operands[1:]]
    if values[0] is None or values[1] is None:
        return None
    return _where(choice.operands[0], values[0], values[1], dtype)


_FOLD: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "minimum": min, "maximum": max,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "not": lambda a: not a,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip


def _fold(op: str, values: tuple[Any, ...], dtype: str) -> Const | None:
    """Integers and truth values only, and casts that are exact: float arithmetic is left to the target's rounding."""
    if op == "cast":
        return _fold_cast(values[0], dtype)
    exact = all(isinstance(v, (int, bool)) for v in values) or op in COMPARISONS
    if not exact or op not in _FOLD or (op in ("floordiv", "mod") and values[1] == 0):
        return None
    return const(_FOLD[op](*values), dtype)


def _fold_cast(value: Any, dtype: str) -> Const | None:
    if dtype in FLOATS:
        import torch  # the one authority on how a Python number rounds to a dtype

        return const(torch.tensor(value, dtype=torch.float64).to(getattr(torch, dtype)).item(), dtype)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return const(value, dtype)


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


def renamed(root: Expr, axes: Mapping[str, str], operands: Mapping[int, int], symbols: Mapping[str, str]) -> Expr:
    """``root`` under other names of its loop indices, operands and symbols; names that a mapping lacks stay."""

    def rule(n: Expr) -> Expr | None:
        if isinstance(n, Index):
            return index(axes.get(n.axis, n.axis))
        if isinstance(n, Load):
            return Load(n.dtype, operands.get(n.operand, n.operand), n.coords)
        return symbol(symbols.get(n.name, n.name)) if isinstance(n, Symbol) else None

    return rewrite(root, rule)


def axes(root: Expr) -> frozenset[str]:
    """The loop indices ``root`` depends on."""
    return frozenset(n.axis for n in walk(root) if isinstance(n, Index))


def symbols(*roots: Expr) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n.name for n in walk(*roots) if isinstance(n, Symbol)))


def operands(*roots: Expr) -> tuple[int, ...]:
    return tuple(sorted({n.operand for n in walk(*roots) if isinstance(n, Load)}))


def contains(root: Expr, kind: type[Expr]) -> bool:
    return any(isinstance(n, kind) for n in walk(root))


# --------------------------------------------------------------------------------------------------------- as text

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "floordiv": "//", "mod": "%", "eq": "==", "ne": "!=",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "and": "and", "or": "or", "xor": "^",
}  # fmt: skip


def to_text(root: Expr, names: Mapping[int, str] | None = None) -> str:
    """One line for people; casts between floats are left out. ``names`` gives operands their names in the model."""
    names = names or {}

    def show(n: Expr) -> str:
        if isinstance(n, Const):
            return f"{n.value:g}" if isinstance(n.value, float) else str(n.value)
        if isinstance(n, Index):
            return n.axis
        if isinstance(n, Symbol):
            return n.name
        if isinstance(n, Load):
            name = names.get(n.operand, f"operand{n.operand}")
            return f"{name}[{', '.join(map(show, n.coords))}]" if n.coords else name
        if isinstance(n, Apply):
            return _show_apply(n, show)
        return type(n).__name__.lower()

    return _bare(root, show(root))


def _show_apply(n: Apply, show: Callable[[Expr], str]) -> str:
    if n.op == "cast":
        floats = n.dtype in FLOATS and n.operands[0].dtype in FLOATS
        return show(n.operands[0]) if floats else f"{n.dtype}({_bare(n.operands[0], show(n.operands[0]))})"
    if n.op in INFIX:
        return f"({show(n.operands[0])} {INFIX[n.op]} {show(n.operands[1])})"
    return f"{n.op}({', '.join(_bare(a, show(a)) for a in n.operands)})"


def _bare(node: Expr, text: str) -> str:
    """The text of an argument or of a whole expression, which needs no parentheses."""
    return text[1:-1] if isinstance(node, Apply) and node.op in INFIX else text


# --------------------------------------------------------------------------------------------------------- as JSON


def to_json(roots: Mapping[str, Expr]) -> dict[str, Any]:
    """Several expressions as one table of nodes, so that shared terms are written once."""
    order = {n: i for i, n in enumerate(walk(*roots.values()))}
    nodes = [[type(n).__name__, n.dtype, *_payload(n), *([[order[a] for a in n.args]] if n.args else [])] for n in order]
    return {"nodes": nodes, "roots": {name: order[root] for name, root in roots.items()}}


def _payload(n: Expr) -> list[Any]:
    if isinstance(n, Const):
        return [n.value if not isinstance(n.value, float) else float(n.value).hex()]
    if isinstance(n, Index):
        return [n.axis]
    if isinstance(n, Symbol):
        return [n.name]
    if isinstance(n, Load):
        return [n.operand]
    return [n.op] if isinstance(n, Apply) else []


def from_json(data: Mapping[str, Any]) -> dict[str, Expr]:
    """Inverse of ``to_json``."""
    built: list[Expr] = []
    for kind, dtype, *rest in data["nodes"]:
        built.append(_node(kind, dtype, rest, built))
    return {name: built[i] for name, i in data["roots"].items()}


def _node(kind: str, dtype: str, rest: list[Any], built: list[Expr]) -> Expr:
    if kind == "Const":
        return const(float.fromhex(rest[0]) if isinstance(rest[0], str) else rest[0], dtype)
    if kind == "Index":
        return Index(dtype, rest[0])
    if kind == "Symbol":
        return Symbol(dtype, rest[0])
    if kind == "Load":
        return Load(dtype, rest[0], tuple(built[i] for i in (rest[1] if len(rest) > 1 else [])))
    if kind == "Apply":
        return Apply(dtype, rest[0], tuple(built[i] for i in rest[1]))
    return {"Score": Score, "Prob": Prob}[kind](dtype)


# -------------------------------------------------------------------------------------------------------- verifier


class InvalidExpr(ValueError):
    """An expression that no pass may produce; always a defect of fuse."""


def verify(root: Expr, *, axes_allowed: frozenset[str], operand_ranks: Mapping[int, int]) -> None:
    """Raises InvalidExpr if a node has a wrong arity or dtype, reads an index not in scope, or misreads an operand."""
    for n in walk(root):
        if n.dtype not in DTYPES:
            raise InvalidExpr(f"dtype {n.dtype!r} of {n} is none of {DTYPES}")
        if isinstance(n, Index) and n.axis not in axes_allowed:
            raise InvalidExpr(f"index {n.axis!r} is not in scope: {sorted(axes_allowed)}")
        if isinstance(n, Load):
            _verify_load(n, operand_ranks)
        if isinstance(n, Apply):
            _verify_apply(n)


def _verify_load(n: Load, ranks: Mapping[int, int]) -> None:
    if n.operand not in ranks:
        raise InvalidExpr(f"{n} reads operand {n.operand}; there are {sorted(ranks)}")
    if len(n.coords) != ranks[n.operand]:
        raise InvalidExpr(f"{n} gives {len(n.coords)} coordinates; operand {n.operand} has {ranks[n.operand]} dimensions")
    if any(c.dtype != "int64" for c in n.coords):
        raise InvalidExpr(f"{n} has a coordinate that is not int64")


def _verify_apply(n: Apply) -> None:
    if ARITY.get(n.op) != len(n.operands):
        raise InvalidExpr(f"{n.op!r} with {len(n.operands)} operands")
    types = [a.dtype for a in n.operands]
    if n.op == "where":
        ok = types[0] == "bool" and types[1] == types[2] == n.dtype
    elif n.op in COMPARISONS:
        ok = types[0] == types[1] and n.dtype == "bool"
    elif n.op in ("isnan", "isinf"):
        ok = n.dtype == "bool"
    elif n.op == "uniform":
        ok = n.dtype == "float32" and all(t == "int64" for t in types)
    elif n.op in ("and", "or", "xor", "not"):
        ok = n.dtype not in FLOATS and all(t == n.dtype for t in types)
    else:
        ok = n.op == "cast" or all(t == n.dtype for t in types)
    if not ok:
        raise InvalidExpr(f"{n.op} of ({', '.join(types)}) as {n.dtype}")
