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
HALVES = ("bfloat16", "float16")
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
# uniform(seed, plane, row, column) is the float32 in [0, 1) that fuse.ir.philox gives for these int64.
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
    """The node ``op(*args)``, or what the first of RULES that fits gives for it."""
    for rule in _RULES_OF[op]:
        if (found := rule.rewrite(op, args, dtype)) is not None:
            return found
    return Apply(dtype, op, args)


def rounded(value: float, dtype: str) -> float:
    """``value`` as a tensor of the float ``dtype`` holds it."""
    import torch  # the one authority on how a Python number rounds to a dtype

    result: float = torch.tensor(value, dtype=torch.float64).to(getattr(torch, dtype)).item()
    return result


# ----------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """An identity: op(*args) of ``dtype``, for any op of ``ops``, is what ``rewrite`` gives unless that is None.

    It holds for all values of the operands, bit for bit: with NaN, infinities, both zeros, and integers that wrap. Each is
    proved under its name in tests/test_proofs.py.
    """

    name: str
    ops: tuple[str, ...]
    rewrite: Callable[[str, tuple[Expr, ...], str], Expr | None]


def _same_dtype(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    return args[0] if args[0].dtype == dtype else None


def _known_condition(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    condition, a, b = args
    return (a if condition.value else b) if isinstance(condition, Const) else None


def _equal_operands(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    return args[-1] if args[-1] is args[-2] else None


def _choice_of_truth(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """where(c, True, x) is c or x; where(c, x, False) is c and x; likewise with not c."""
    condition, a, b = args
    if dtype != "bool" or not (isinstance(a, Const) or isinstance(b, Const)):
        return None
    negated = apply("not", condition, dtype="bool")
    if isinstance(a, Const):
        return apply("or", condition, b, dtype="bool") if a.value else apply("and", negated, b, dtype="bool")
    assert isinstance(b, Const)
    return apply("or", negated, a, dtype="bool") if b.value else apply("and", condition, a, dtype="bool")


def _of_choice(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """A comparison or cast of where(c, 0, -inf) is a choice between its two values: where(c, 0, -inf) < -1 is not c."""
    choice, *rest = args
    if not (
        isinstance(choice, Apply) and choice.op == "where" and _constants(choice) and all(isinstance(x, Const) for x in rest)
    ):
        return None
    a, b = (apply(op, x, *rest, dtype=dtype) for x in choice.operands[1:])
    if any(isinstance(x, Apply) and x.op == op for x in (a, b)):
        return None
    return apply("where", choice.operands[0], a, b, dtype=dtype)


def _constants(e: Expr) -> bool:
    """A constant, or a choice between such."""
    return isinstance(e, Const) or (isinstance(e, Apply) and e.op == "where" and all(map(_constants, e.operands[1:])))


def _known_truth(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    for this, other in (args, args[::-1]) if dtype == "bool" else ():
        if isinstance(this, Const):
            if op == "xor":
                return apply("not", other, dtype="bool") if this.value else other
            return other if bool(this.value) == (op == "and") else this
    return None


def _complement(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    for this, other in (args, args[::-1]) if dtype == "bool" else ():
        if isinstance(this, Apply) and this.op == "not" and this.operands[0] is other:
            return const(op == "or", "bool")
    return None


def _double_negation(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    inner = args[0]
    return inner.operands[0] if isinstance(inner, Apply) and inner.op == "not" else None


def _zero_addend(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """x + 0.0 is not x where x is -0.0, but x + -0.0 is."""
    for this, other in (args, args[::-1]) if dtype != "bool" else ():
        if isinstance(this, Const) and repr(this.value) == ("-0.0" if dtype in FLOATS else "0"):
            return other
    return None


def _zero_subtrahend(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    zero = isinstance(args[1], Const) and repr(args[1].value) in ("0", "0.0")
    return args[0] if zero and dtype != "bool" else None


def _factor_one(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    for this, other in (args, args[::-1]) if dtype != "bool" else ():
        if isinstance(this, Const) and this.value == 1:
            return other
    return None


def _zero_factor(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """Of integers; a float times zero may be -0.0 or NaN."""
    for this in args if dtype in INTS else ():
        if isinstance(this, Const) and this.value == 0:
            return this
    return None


def _absorption(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """x and (x or y) is x, max(x, min(x, y)) is x; floats have NaN."""
    dual = _DUAL[op]
    for this, other in (args, args[::-1]) if dtype not in FLOATS else ():
        if isinstance(other, Apply) and other.op == dual and this in other.operands:
            return this
    return None


_DUAL = {"and": "or", "or": "and", "minimum": "maximum", "maximum": "minimum"}
_FOLD: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "minimum": min, "maximum": max,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "not": lambda a: not a if isinstance(a, bool) else ~a,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "isnan": lambda a: math.isnan(a), "isinf": lambda a: math.isinf(a),
}  # fmt: skip


def _fold(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """Integers and truth values, which wrap, and questions about floats: float arithmetic is left to the target's rounding."""
    consts = [a for a in args if isinstance(a, Const)]
    if len(consts) < len(args) or dtype in FLOATS:
        return None
    values = [rounded(a.value, a.dtype) if a.dtype in FLOATS else a.value for a in consts]
    if op in ("floordiv", "mod") and values[1] == 0:
        return None
    return const(_wrapped(_FOLD[op](*values), dtype), dtype)


def _fold_cast(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """What PyTorch makes of the number; out of the range of an integer dtype that depends on the machine."""
    if not isinstance(args[0], Const):
        return None
    value = rounded(args[0].value, args[0].dtype) if args[0].dtype in FLOATS else args[0].value
    if dtype in FLOATS:
        return const(rounded(value, dtype), dtype)
    if dtype == "bool":
        return const(value != 0, "bool")
    if not isinstance(value, float):
        return const(_wrapped(value, dtype), dtype)
    return const(int(value), dtype) if math.isfinite(value) and _wrapped(int(value), dtype) == int(value) else None


def _wrapped(value: int, dtype: str) -> int:
    """An integer as its dtype stores it."""
    if dtype == "bool":
        return value
    bits, sign = 8 if dtype == "uint8" else int(dtype[3:]), 0 if dtype == "uint8" else 1
    half = sign << (bits - 1)
    return (int(value) + half) % (1 << bits) - half


RULES = (
    Rule("cast to the same dtype", ("cast",), _same_dtype),
    Rule("known condition", ("where",), _known_condition),
    Rule("equal operands", ("where", "and", "or", "minimum", "maximum"), _equal_operands),
    Rule("choice of truth values", ("where",), _choice_of_truth),
    Rule("function of a choice of constants", (*COMPARISONS, "cast"), _of_choice),
    Rule("known truth value", ("and", "or", "xor"), _known_truth),
    Rule("complement", ("and", "or"), _complement),
    Rule("double negation", ("not",), _double_negation),
    Rule("zero addend", ("add",), _zero_addend),
    Rule("zero subtrahend", ("sub",), _zero_subtrahend),
    Rule("factor one", ("mul",), _factor_one),
    Rule("zero factor", ("mul",), _zero_factor),
    Rule("absorption", tuple(_DUAL), _absorption),
    Rule("constant operands", tuple(_FOLD), _fold),
    Rule("constant cast", ("cast",), _fold_cast),
)
_RULES_OF = {op: tuple(rule for rule in RULES if op in rule.ops) for op in ARITY}


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
