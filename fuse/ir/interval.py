"""Interval arithmetic (Moore, Interval Analysis, 1966): what values an expression can take, from what its leaves can be.

One table of rules serves all who ask. The ends of a range are numbers, or tensors that hold one number for each of many
ranges. The functions in ``templates/cpp/prelude/ranges.h`` and ``templates/triton/ranges.py.jinja`` keep to the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fuse.ir.expr import DTYPES, FLOATS, INTS, PLACES, Apply, Const, Expr, Index, Symbol, rounded, walk
from fuse.ir.operators import OPERATORS, Operator

# Kernels refuse longer sequences, so index arithmetic can be proved to fit 32-bit lanes.
MAX_LENGTH = 2**24
# float64, in which tensors hold their ends, has every integer that is smaller.
_EXACT = 2**53
_LENGTHS = {"q": "q_len", "k": "kv_len"}

# A number or a tensor of them, float64 or bool; Python's operators serve both, and ``_pick`` chooses.
End = Any
Leaves = Callable[[Expr], "Range"]


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, infinities included where they are named, and perhaps NaN.

    Of truth values ``low`` says whether it must hold, ``high`` whether it can.
    """

    low: End
    high: End
    nan: End = False

    @property
    def infinite(self) -> End:
        return (self.low == -math.inf) | (self.high == math.inf)

    def holds(self, x: float) -> End:
        return self.nan if math.isnan(x) else (self.low <= x) & (x <= self.high)


ANYTHING = Range(-math.inf, math.inf, True)
TRUTH = Range(False, True)


def point(x: float) -> Range:
    return Range(x, x) if x == x else ANYTHING


def _integers(dtype: str) -> Range:
    limits = torch.iinfo(getattr(torch, dtype))
    return Range(limits.min, limits.max)


WHOLE = {**dict.fromkeys(FLOATS, ANYTHING), **{dtype: _integers(dtype) for dtype in INTS}, "bool": TRUTH}
"""All that a dtype can hold."""


# ------------------------------------------------------------------------------------------------------ expressions


def range_of(root: Expr, leaves: Leaves) -> Range:
    """What an integer or a truth value can be. ``leaves``: what its constants, indices and symbols are.

    What comes of floats or is read from tensors can be anything: functions of floats differ by a last bit between targets.
    """
    found: dict[Expr, Range] = {}
    for n in walk(root):
        if isinstance(n, Apply) and n.dtype not in FLOATS:
            found[n] = applied(n, [found[a] for a in n.operands])
        else:
            found[n] = leaves(n) if isinstance(n, (Const, Index, Symbol)) else WHOLE[n.dtype]
    return found[root]


def anywhere(leaf: Expr) -> Range:
    """What a leaf is in every call."""
    if isinstance(leaf, Const):
        return point(leaf.value)
    known = (
        not isinstance(leaf, Symbol)
        or leaf.name in ("q_len", "kv_len", *PLACES)
        or (leaf.name[0] == "B" and leaf.name[1:].isdigit())
    )
    return Range(0, MAX_LENGTH) if known else WHOLE[leaf.dtype]


def in_call(symbols: Mapping[str, int], features: Mapping[str, int] = MappingProxyType({})) -> Leaves:
    """What leaves are in a call with these values of symbols; ``features``: the lengths of "d" and "e"."""

    def leaf(n: Expr) -> Range:
        if isinstance(n, Symbol):
            return point(symbols[n.name])
        if not isinstance(n, Index):
            return anywhere(n)
        length = features.get(n.axis) or symbols[_LENGTHS.get(n.axis, f"B{n.axis[1:]}")]
        return Range(0, length - 1)

    return leaf


def applied(n: Apply, args: Sequence[Range]) -> Range:
    """What the operator of ``n`` gives on ``args``, in its dtype."""
    if n.op == "cast":
        return _cast(args[0], n.dtype)
    rule = RULES.get((n.op, n.operands[-1].dtype))
    return WHOLE[n.dtype] if rule is None else in_dtype(rule(*args), n.dtype)


def in_dtype(r: Range, dtype: str) -> Range:
    """Rounding never changes the order of two numbers, so that the ends may be rounded; integers wrap instead."""
    if dtype in FLOATS:
        return Range(_rounded(r.low, dtype), _rounded(r.high, dtype), r.nan)
    whole = WHOLE[dtype]
    least, most = whole.low, whole.high
    if isinstance(r.low, Tensor) or isinstance(r.high, Tensor):
        least, most = max(least, 1 - _EXACT), min(most, _EXACT - 1)
    fits = (least <= r.low) & (r.high <= most)
    return Range(_pick(fits, r.low, whole.low), _pick(fits, r.high, whole.high))


# ------------------------------------------------------------------------------------------------------------- ends


def as_tensor(x: End) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.bool if isinstance(x, bool) else torch.float64)


def _pick(condition: End, a: End, b: End) -> End:
    if isinstance(condition, Tensor):
        return torch.where(condition, as_tensor(a), as_tensor(b))
    return a if condition else b


def _hull(*corners: End) -> Range:
    low = high = corners[0]
    for x in corners[1:]:
        low, high = _pick(x < low, x, low), _pick(x > high, x, high)
    return Range(low, high)


def _least(a: End, b: End) -> End:
    return _pick(b < a, b, a)


def _most(a: End, b: End) -> End:
    return _pick(b > a, b, a)


def _by_tensor(function: Callable[[Tensor], Tensor], x: End) -> End:
    return function(x) if isinstance(x, Tensor) else function(torch.tensor(x, dtype=torch.float64)).item()


def _rounded(x: End, dtype: str) -> End:
    return x.to(getattr(torch, dtype)).double() if isinstance(x, Tensor) else _rounded_number(x, dtype)


_rounded_number = lru_cache(maxsize=4096)(rounded)  # the same few, whenever a score's cases are tried


def _integer(x: End) -> End:
    return x.double().trunc() if isinstance(x, Tensor) else int(x)


# ------------------------------------------------------------------------------------------------------------ rules


def _cast(a: Range, target: str) -> Range:
    if target == "bool":
        return _not(_equal(a, Range(0, 0)))
    return in_dtype(_truncated(a) if target in INTS else a, target)


def _truncated(a: Range) -> Range:
    undefined = a.nan | a.infinite
    low, high = (_integer(_pick(undefined, 0, x)) for x in (a.low, a.high))
    return Range(_pick(undefined, -math.inf, low), _pick(undefined, math.inf, high))


def _rising(operator: Operator, least: float, a: Range) -> Range:
    low, high = (_by_tensor(operator.function, _most(x, least)) for x in (a.low, a.high))
    return Range(low, high, a.nan | (a.low < least))


def _add(a: Range, b: Range) -> Range:
    low, high = a.low + b.low, a.high + b.high
    opposed = ((a.low == -math.inf) & (b.high == math.inf)) | ((a.high == math.inf) & (b.low == -math.inf))
    # infinities of either sign have no sum
    return Range(_pick(low == low, low, -math.inf), _pick(high == high, high, math.inf), a.nan | b.nan | opposed)


def _neg(a: Range) -> Range:
    return Range(-a.high, -a.low, a.nan)


def _mul(a: Range, b: Range) -> Range:
    found = _hull(*(_pick((x == 0) | (y == 0), 0, x * y) for x in (a.low, a.high) for y in (b.low, b.high)))
    undefined = (a.holds(0) & b.infinite) | (b.holds(0) & a.infinite)
    return Range(found.low, found.high, a.nan | b.nan | undefined)


def _div(a: Range, b: Range) -> Range:
    unknown = b.holds(0) | (a.infinite & b.infinite)
    found = _hull(*(x / _pick(unknown, 1, y) for x in (a.low, a.high) for y in (b.low, b.high)))
    low, high = _pick(unknown, -math.inf, found.low), _pick(unknown, math.inf, found.high)
    return Range(low, high, a.nan | b.nan | unknown)


def _abs(a: Range) -> Range:
    found = _hull(abs(a.low), abs(a.high))
    return Range(_pick(a.holds(0), 0, found.low), found.high, a.nan)


def _floordiv(a: Range, b: Range) -> Range:
    found = _hull(*(x // _most(y, 1) for x in (a.low, a.high) for y in (b.low, b.high)))
    return _if_positive(b, found)


def _mod(a: Range, b: Range) -> Range:
    """Within one period the remainder grows with the dividend."""
    n = _most(b.low, 1)
    one = (b.low == b.high) & (a.low // n == a.high // n)
    return _if_positive(b, Range(_pick(one, a.low % n, 0), _pick(one, a.high % n, b.high - 1)))


def _if_positive(divisor: Range, found: Range) -> Range:
    positive = divisor.low > 0
    return Range(_pick(positive, found.low, -math.inf), _pick(positive, found.high, math.inf))


def _less(a: Range, b: Range) -> Range:
    return _compared(a.high < b.low, a.low < b.high, a, b)


def _less_or_equal(a: Range, b: Range) -> Range:
    return _compared(a.high <= b.low, a.low <= b.high, a, b)


def _equal(a: Range, b: Range) -> Range:
    return _compared((a.low == b.high) & (a.high == b.low), (a.low <= b.high) & (b.low <= a.high), a, b)


def _compared(must: End, can: End, a: Range, b: Range) -> Range:
    """Comparisons with NaN are false."""
    return Range(_pick(must, (a.nan | b.nan) == 0, False), can)


def _not(a: Range) -> Range:
    return Range(a.high == 0, a.low == 0)


def _where(c: Range, a: Range, b: Range) -> Range:
    either = Range(_least(a.low, b.low), _most(a.high, b.high), a.nan | b.nan)
    chosen = [(a.low, either.low, b.low), (a.high, either.high, b.high), (a.nan, either.nan, b.nan)]
    return Range(*(_pick(c.low, x, _pick(c.high, either, y)) for x, either, y in chosen))


_Rule = Callable[..., Range]
_OF_ALL: dict[str, _Rule] = {
    "minimum": lambda a, b: Range(_least(a.low, b.low), _least(a.high, b.high), a.nan | b.nan),
    "maximum": lambda a, b: Range(_most(a.low, b.low), _most(a.high, b.high), a.nan | b.nan),
    "lt": _less, "gt": lambda a, b: _less(b, a), "le": _less_or_equal, "ge": lambda a, b: _less_or_equal(b, a),
    "eq": _equal, "ne": lambda a, b: _not(_equal(a, b)), "where": _where,
}  # fmt: skip
_OF_NUMBERS: dict[str, _Rule] = {
    "add": _add, "sub": lambda a, b: _add(a, _neg(b)), "neg": _neg, "mul": _mul, "abs": _abs,
    "sign": lambda a: Range(-1, 1, a.nan),
}  # fmt: skip
_OF_INTEGERS: dict[str, _Rule] = {"floordiv": _floordiv, "mod": _mod}
_OF_FLOATS: dict[str, _Rule] = {
    "div": _div, **{o.name: partial(_rising, o, o.rising) for o in OPERATORS.values() if o.rising is not None}
}  # fmt: skip
_OF_TRUTHS: dict[str, _Rule] = {
    "and": lambda a, b: Range(a.low & b.low, a.high & b.high), "or": lambda a, b: Range(a.low | b.low, a.high | b.high),
    "xor": lambda a, b: _not(_equal(a, b)), "not": _not,
}  # fmt: skip
_TABLES = (
    (DTYPES, _OF_ALL), ((*FLOATS, *INTS), _OF_NUMBERS), (INTS, _OF_INTEGERS), (FLOATS, _OF_FLOATS), (("bool",), _OF_TRUTHS),
)  # fmt: skip
RULES = {(op, dtype): rule for dtypes, rules in _TABLES for op, rule in rules.items() for dtype in dtypes}
"""By an operator and the dtype of its last operand. What is not here can be anything."""
