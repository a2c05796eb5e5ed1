"""What values a score can take: interval arithmetic over expressions, with the roundings of their dtypes.

The product of query and key is taken to be finite and no larger than ``largest(dtype)``, and what is made of tensors and
positions alone, such as a bias, to be such a number or -inf: what exceeds them is no score that eager could tell from a mask.
Everything else is proved: a bound that does not hold for all such values is not given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, Load, Score, Symbol
from fuse.ir.operators import OPERATORS, Operator

_NOTHING: Mapping[Expr, Range] = {}


def largest(dtype: str) -> float:
    """The size up to which scores count as ordinary: far below what masks are filled with, in every dtype."""
    return 2.0**14 if dtype == "float16" else 1e28


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, infinities included where they are named, and perhaps NaN."""

    low: float
    high: float
    nan: bool = False

    @property
    def infinite(self) -> bool:
        return math.isinf(self.low) or math.isinf(self.high)

    def holds(self, x: float) -> bool:
        return self.nan if math.isnan(x) else self.low <= x <= self.high


ANYTHING = Range(-math.inf, math.inf, True)
TRUTH = Range(0, 1)


def highest(e: Expr, known: Mapping[Expr, Range] = _NOTHING) -> float:
    """The largest value of ``e``, where ``known`` limits what some nodes can be; +inf where it may be NaN."""
    found = value_range(e, known)
    return math.inf if found.nan else found.high


def value_range(e: Expr, known: Mapping[Expr, Range] = _NOTHING) -> Range:
    found: dict[Expr, Range] = dict(known)
    data: set[Expr] = set()
    scored: set[Expr] = set()
    for n in expr.walk(e):
        r = _leaf(n) if not isinstance(n, Apply) else applied(n, [found[a] for a in n.operands])
        if isinstance(n, Score) or any(a in scored for a in n.args):
            scored.add(n)
        elif n.dtype != "bool" and (isinstance(n, (Load, Index, Symbol)) or any(a in data for a in n.args)):
            data.add(n)
            r = Range(r.low, min(r.high, largest(n.dtype))) if n.dtype in expr.FLOATS else r
        found.setdefault(n, r)
    return found[e]


def applied(n: Apply, args: list[Range]) -> Range:
    """What the operator of ``n`` gives on ``args``, in its dtype."""
    return _rounded(_apply(n, args), n.dtype)


def constant(n: Expr) -> Const | None:
    """The value of an operator on constants, as PyTorch rounds it: halves compute in float32, Python numbers unrounded."""
    if not isinstance(n, Apply) or not all(isinstance(a, Const) for a in n.operands):
        return None
    values = [a.value for a in n.operands if isinstance(a, Const)]
    if n.dtype not in expr.FLOATS or any(a.dtype not in (*expr.FLOATS, "bool") for a in n.operands):
        return None  # ``apply`` folds integers and truth values itself
    if n.op == "cast":
        return None
    return expr.const(_value(n.op, n.dtype, values), n.dtype)


def _value(op: str, dtype: str, values: Sequence[float]) -> float:
    wide = torch.float64 if dtype == "float64" else torch.float32
    args = [torch.tensor(v, dtype=torch.bool if isinstance(v, bool) else wide) for v in values]
    narrow: torch.dtype = getattr(torch, dtype)
    result: float = OPERATORS[op].function(*args).to(narrow).item()
    return result


# ------------------------------------------------------------------------------------------------------- leaves


def _leaf(n: Expr) -> Range:
    if isinstance(n, Const):
        return Range(n.value, n.value) if n.value == n.value else ANYTHING
    if isinstance(n, Index):
        return Range(0, 2.0**31)
    if isinstance(n, Score):
        return Range(-largest(n.dtype), largest(n.dtype))
    if isinstance(n, Load) and n.dtype in expr.FLOATS:
        return ANYTHING
    return _whole(n.dtype)


def _whole(dtype: str) -> Range:
    """All that the dtype can hold."""
    if dtype in expr.FLOATS:
        return ANYTHING
    if dtype == "bool":
        return TRUTH
    limits = torch.iinfo(getattr(torch, dtype))
    return Range(float(limits.min), float(limits.max))


def _rounded(r: Range, dtype: str) -> Range:
    """Rounding never changes the order of two numbers, so that the ends may be rounded; integers wrap instead."""
    if dtype == "bool":
        return TRUTH
    if dtype in expr.FLOATS:
        low, high = (expr.rounded(x, dtype) for x in (r.low, r.high))
        return Range(low, high, r.nan)
    whole = _whole(dtype)
    return r if not r.nan and whole.low <= r.low and r.high <= whole.high else whole


# ---------------------------------------------------------------------------------------------------- operators


def _apply(n: Apply, args: list[Range]) -> Range:
    operator = OPERATORS[n.op]
    if operator.rising is not None:
        return _rising(operator, operator.rising, args[0])
    if n.op == "cast":
        return _cast(args[0], n.dtype)
    if n.op == "where":
        return Range(min(args[1].low, args[2].low), max(args[1].high, args[2].high), args[1].nan or args[2].nan)
    rule = RULES.get(n.op)
    return _whole(n.dtype) if rule is None else rule(*args)


def _rising(operator: Operator, least: float, a: Range) -> Range:
    low, high = (operator.function(torch.tensor(max(x, least), dtype=torch.float64)).item() for x in (a.low, a.high))
    return Range(low, high, a.nan or a.low < least)


def _cast(a: Range, dtype: str) -> Range:
    if dtype in expr.FLOATS:
        return a
    return _whole(dtype) if a.nan or a.infinite else Range(math.trunc(a.low), math.trunc(a.high))


def _add(a: Range, b: Range) -> Range:
    low, high = a.low + b.low, a.high + b.high
    opposed = (a.low == -math.inf and b.high == math.inf) or (a.high == math.inf and b.low == -math.inf)
    return Range(-math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high, a.nan or b.nan or opposed)


def _neg(a: Range) -> Range:
    return Range(-a.high, -a.low, a.nan)


def _mul(a: Range, b: Range) -> Range:
    ends = [0.0 if 0 in (x, y) else x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    undefined = (a.holds(0) and b.infinite) or (b.holds(0) and a.infinite)
    return Range(min(ends), max(ends), a.nan or b.nan or undefined)


def _div(a: Range, b: Range) -> Range:
    if b.holds(0) or (a.infinite and b.infinite):
        return ANYTHING
    ends = [x / y for x in (a.low, a.high) for y in (b.low, b.high)]
    return Range(min(ends), max(ends), a.nan or b.nan)


def _abs(a: Range) -> Range:
    return Range(0.0 if a.holds(0) else min(abs(a.low), abs(a.high)), max(abs(a.low), abs(a.high)), a.nan)


RULES: dict[str, Callable[..., Range]] = {
    "add": _add,
    "sub": lambda a, b: _add(a, _neg(b)),
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "abs": _abs,
    "minimum": lambda a, b: Range(min(a.low, b.low), min(a.high, b.high), a.nan or b.nan),
    "maximum": lambda a, b: Range(max(a.low, b.low), max(a.high, b.high), a.nan or b.nan),
    "sign": lambda a: Range(-1.0, 1.0, a.nan),
}
