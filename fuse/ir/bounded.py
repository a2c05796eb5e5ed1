"""What an integer can be that is made of floats or chosen by comparisons, as the bucket of a distance is.

``fuse.ir.interval`` takes what comes of floats for anything, and both branches of a choice for possible whatever was compared.
Here floats have ranges, too: those of exact arithmetic and of its roundings, widened by more than targets differ in the last
bits of functions. And a branch is looked at where its condition holds: ``where(x < 8, x, log(x / 8))`` takes no logarithm of
less than 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from fuse.ir.expr import FLOATS, INTS, Apply, Const, Expr, Index, Symbol, walk
from fuse.ir.interval import RULES, WHOLE, Leaves, Range, applied, in_dtype
from fuse.ir.operators import OPERATORS

# What a target may miss a function by, beside a number and as a share: float32's approximations on GPUs are far better.
_OFF = 1e-5
_CHOICES = 4  # within one another; of a deeper one both branches are taken as if nothing were known
_Known = Mapping[Expr, Range]
_NOTHING: _Known = MappingProxyType({})


def bounds_of(root: Expr, leaves: Leaves) -> Range:
    """What an integer or a truth value can be. ``leaves``: what its constants, indices and symbols are."""
    found = _bounds(root, leaves, _NOTHING, _CHOICES)
    return WHOLE[root.dtype] if found is None else found


def _bounds(root: Expr, leaves: Leaves, known: _Known, choices: int) -> Range | None:
    """Where some nodes are within what is ``known``; None where that cannot be."""
    found: dict[Expr, Range] = {}
    for n in walk(root):
        r: Range | None = _of(n, found, leaves)
        if choices and isinstance(n, Apply) and n.op == "where":
            r = _chosen(n, found, leaves, known, choices)
        if r is not None and n in known:
            r = _common(r, known[n])
        if r is None:
            return None
        found[n] = r
    return found[root]


def _of(n: Expr, found: _Known, leaves: Leaves) -> Range:
    if isinstance(n, Apply):
        args = [found[a] for a in n.operands]
        return _real(n, args) if n.dtype in FLOATS else applied(n, args)
    return leaves(n) if isinstance(n, (Const, Index, Symbol)) else WHOLE[n.dtype]


# ---------------------------------------------------------------------------------------------------------------- floats


def _real(n: Apply, args: list[Range]) -> Range:
    """With the rounding to its dtype or without, as kernels may leave it out."""
    if n.op == "cast":
        exact = Range(float(args[0].low), float(args[0].high), args[0].nan)
    elif (rule := RULES.get((n.op, n.operands[-1].dtype))) is not None:
        exact = rule(*args)
    else:
        return WHOLE[n.dtype]
    limits, rounded = torch.finfo(getattr(torch, n.dtype)), in_dtype(exact, n.dtype)
    off = _OFF if OPERATORS[n.op].costly and OPERATORS[n.op].rising is not None else 0.0
    low, high = min(exact.low, rounded.low), max(exact.high, rounded.high)
    return Range(-_above(-low, off, limits), _above(high, off, limits), exact.nan or rounded.nan)


def _above(x: float, off: float, limits: torch.finfo) -> float:
    """More than a number becomes that is at most ``x``: one below the normal ones may become zero."""
    if math.isinf(x):
        return x if x > 0 else -limits.max
    above = x + max(2 * limits.eps, off) * abs(x) + off
    return 0.0 if -limits.tiny < above < 0 else above


# --------------------------------------------------------------------------------------------------------------- choices


def _chosen(n: Apply, found: _Known, leaves: Leaves, known: _Known, choices: int) -> Range | None:
    """Both branches, each where the condition chooses it; None where neither is ever."""
    condition, *branches = n.operands
    ranges = []
    for branch, holds in zip(branches, (True, False), strict=True):
        if (also := _where(condition, holds, found)) is None:
            continue
        of_branch = _bounds(branch, leaves, _both(known, also), choices - 1)
        ranges += [of_branch] if of_branch is not None else []
    if not ranges:
        return None
    return Range(min(r.low for r in ranges), max(r.high for r in ranges), any(r.nan for r in ranges))


def _where(condition: Expr, holds: bool, found: _Known) -> _Known | None:
    """What integers are where ``condition`` holds, or does not; None where it is never so.

    Of floats nothing is said: what is compared has roundings that what is chosen may lack.
    """
    truth = found[condition]
    if (holds and not truth.high) or (not holds and truth.low):
        return None
    if not isinstance(condition, Apply):
        return _NOTHING
    if condition.op == "not":
        return _where(condition.operands[0], not holds, found)
    if condition.op == ("and" if holds else "or"):
        parts = [_where(c, holds, found) for c in condition.operands]
        return None if None in parts else _both(*(p for p in parts if p is not None))
    if any(x.dtype not in INTS for x in condition.operands) or condition.op not in _COMPARED:
        return _NOTHING
    x, y = condition.operands
    if (between := _COMPARED[condition.op][holds]) is None:
        return _NOTHING
    if between == ">" or between == ">=":
        x, y, between = y, x, between.replace(">", "<")
    a, b = found[x], found[y]
    if between == "==":
        return {x: b, y: a}
    apart = 1 if between == "<" else 0
    return {x: Range(-math.inf, b.high - apart), y: Range(a.low + apart, math.inf)}


# What is so where a comparison does not hold, and where it does.
_COMPARED = {"lt": (">=", "<"), "le": (">", "<="), "gt": ("<=", ">"), "ge": ("<", ">="), "eq": (None, "=="), "ne": ("==", None)}


def _both(a: _Known, b: _Known) -> _Known:
    """What is known of nodes in either; an empty range says that it cannot be."""
    shared = {n: Range(max(a[n].low, b[n].low), min(a[n].high, b[n].high)) for n in a.keys() & b.keys()}
    return {**a, **b, **shared}


def _common(a: Range, b: Range) -> Range | None:
    low, high = max(a.low, b.low), min(a.high, b.high)
    return Range(low, high, a.nan) if low <= high else None
