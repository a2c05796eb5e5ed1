"""What values a score can take, by interval arithmetic (``fuse.ir.interval``), with the roundings of their dtypes.

The product of query and key is taken to be finite and no larger than ``largest(dtype)``, and what is made of tensors and
positions alone, such as a bias, to be such a number or -inf: what exceeds them is no score that eager could tell from a mask.
Everything else is proved: a bound that does not hold for all such values is not given, and NaN is told that comes of
infinities which are written in the score: -inf * 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, Load, Score, Symbol
from fuse.ir.interval import TRUTH, WHOLE, Range, applied, point
from fuse.ir.operators import OPERATORS

_NOTHING: Mapping[Expr, Range] = {}


def largest(dtype: str) -> float:
    """The size up to which scores count as ordinary: far below what masks are filled with, in every dtype."""
    return 2.0**14 if dtype == "float16" else 1e28


def highest(e: Expr, known: Mapping[Expr, Range] = _NOTHING) -> float:
    """The largest value of ``e``, where ``known`` limits what some nodes can be; +inf where it may be NaN."""
    found = value_range(e, known)
    return math.inf if found.nan else found.high


def value_range(e: Expr, known: Mapping[Expr, Range] = _NOTHING) -> Range:
    found: dict[Expr, Range] = dict(known)
    finite = {n: _finite(n, r) for n, r in known.items()}  # where no tensor holds an infinity
    data: set[Expr] = set()
    scored: set[Expr] = set()
    for n in expr.walk(e):
        r = _of(n, found)
        if isinstance(n, Score) or any(a in scored for a in n.args):
            scored.add(n)
        elif n.dtype != "bool" and (isinstance(n, (Load, Index, Symbol)) or any(a in data for a in n.args)):
            data.add(n)
            if n.dtype in expr.FLOATS:
                written = _where_tensors_are_finite(n, finite)
                r = Range(r.low, min(r.high, largest(n.dtype)), written.nan)
                finite.setdefault(n, written)
        found.setdefault(n, r)
        finite.setdefault(n, found[n])
    return found[e]


def _where_tensors_are_finite(n: Expr, finite: Mapping[Expr, Range]) -> Range:
    """What a float is that is made of tensors: infinite or NaN only where an infinity is written in it."""
    if not isinstance(n, Apply):
        return _finite(n, WHOLE[n.dtype])
    args = [finite[a] for a in n.operands]
    r = applied(n, args)
    return r if any(a.infinite or a.nan for a in args) else _finite(n, r)


def _finite(n: Expr, r: Range) -> Range:
    if n.dtype not in expr.FLOATS:
        return r
    return Range(max(r.low, min(-largest(n.dtype), 2 * r.high)), min(r.high, largest(n.dtype)))


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


# -------------------------------------------------------------------------------------------------------- nodes


def _of(n: Expr, found: Mapping[Expr, Range]) -> Range:
    if isinstance(n, Const):
        return point(n.value)
    if n.dtype == "bool":
        return TRUTH  # what scores are assumed to be decides no comparison
    if isinstance(n, Apply):
        return applied(n, [found[a] for a in n.operands])
    if isinstance(n, Index):
        return Range(0, 2**31)
    if isinstance(n, Score):
        return Range(-largest(n.dtype), largest(n.dtype))
    return WHOLE[n.dtype]
