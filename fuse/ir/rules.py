"""Identities of expressions: every node that is built passes through them (``fuse.ir.expr.apply``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuse.ir.expr import COMPARISONS, FLOATS, INTS, Apply, Const, Expr, Rewrite, apply, const, rewrites, rounded
from fuse.ir.operators import ARITY


@dataclass(frozen=True)
class Rule:
    """An identity: op(*args) of ``dtype``, for any op of ``ops``, is what ``rewrite`` gives unless that is None.

    It holds for all values of the operands, bit for bit: with NaN, infinities, both zeros, and integers that wrap. Each is
    proved under its name in tests/test_proofs.py.
    """

    name: str
    ops: tuple[str, ...]
    rewrite: Rewrite


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


def _cast_of_choice(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """cast(where(c, x, 0)) is where(c, cast(x), 0): what x is where c holds then stands by itself."""
    choice = args[0]
    if not (isinstance(choice, Apply) and choice.op == "where" and any(isinstance(x, Const) for x in choice.operands[1:])):
        return None
    a, b = (apply(op, x, dtype=dtype) for x in choice.operands[1:])
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
    Rule("cast of a choice", ("cast",), _cast_of_choice),
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
rewrites.update({op: tuple(rule.rewrite for rule in RULES if op in rule.ops) for op in ARITY})
