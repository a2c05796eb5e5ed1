"""Which entries of the scores are masked: the predicate is separated from the rest, and bounded in closed form.

A mask may be written as where or masked_fill with a large negative number, or as an addend that takes such a value. The
predicate's comparisons of positions become loop bounds, lower(q) <= k < upper(q); what is left is checked per entry.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv

from fuse import expr
from fuse.expr import Apply, Const, Expr, Score, apply, const
from fuse.index import Index, linear
from fuse.passes.elements import Reader, spec_reader
from fuse.spec import AttentionSpec, Mask

# A replaced score of this size vanishes beside any score above it by 256; an addend has to dwarf every finite score.
REPLACED, ADDED = -1e3, -1e29
_NEGATED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Split:
    """The score is ``visible`` where ``predicate`` holds and at most ``fill`` elsewhere."""

    predicate: Expr
    visible: Expr
    fill: float


def recover_mask(spec: AttentionSpec) -> AttentionSpec:
    """The spec with what can be proved about its masked entries; unchanged where there are none."""
    split = _split(spec.score)
    if split is None or split.fill > REPLACED:
        return spec
    reader = spec_reader(spec)
    clauses = [(*(_bound(reader, c) or ("residual", c)),) for c in _conjuncts(_pushed(split.predicate))]
    lowers, uppers, rest = ([e for kind, e in clauses if kind == wanted] for wanted in ("lower", "upper", "residual"))
    mask = Mask(
        predicate=split.predicate,
        visible=split.visible,
        lower=_joined("maximum", lowers),
        upper=_joined("minimum", uppers),
        residual=_joined("and", rest, "bool"),
        fill=split.fill,
    )
    return dataclasses.replace(spec, mask=mask)


def _joined(op: str, terms: list[Expr], dtype: str = "int64") -> Expr | None:
    out: Expr | None = None
    for term in terms:
        out = term if out is None else apply(op, out, term, dtype=dtype)
    return out


# ------------------------------------------------------------------------------------------------------ the predicate


def _split(e: Expr) -> Split | None:
    """Separates the outermost masks from a score; None where nothing is masked."""
    if not isinstance(e, Apply):
        return None
    if e.op == "where":
        return _split_where(e)
    if e.op in ("add", "sub"):
        return _split_sum(e)
    if e.op == "cast" and e.dtype in expr.FLOATS:
        return _through(_split(e.operands[0]), lambda x: apply("cast", x, dtype=e.dtype))
    if e.op in ("mul", "div") and isinstance(e.operands[1], Const) and e.operands[1].value > 0:
        factor = e.operands[1]
        return _through(_split(e.operands[0]), lambda x: apply(e.op, x, factor, dtype=e.dtype))
    if e.op == "maximum" and isinstance(e.operands[1], Const):  # max(s, finfo.min), which keeps -inf out of the softmax
        floor = e.operands[1]
        inner = _split(e.operands[0])
        return inner and Split(
            inner.predicate, apply("maximum", inner.visible, floor, dtype=e.dtype), max(inner.fill, floor.value)
        )
    return None


def _split_where(e: Apply) -> Split | None:
    condition, x, y = e.operands
    if expr.contains(condition, Score):
        return None
    for predicate, kept, masked in ((condition, x, y), (_not(condition), y, x)):
        fill = _number(masked)
        if fill is not None and fill <= REPLACED:
            inner = _split(kept) or Split(const(True, "bool"), kept, -math.inf)
            return Split(_and(inner.predicate, predicate), inner.visible, max(inner.fill, fill))
    return None


def _split_sum(e: Apply) -> Split | None:
    """score + mask, where the mask is a large negative number at some entries; several such addends."""
    left, right = e.operands
    if e.op == "add" and not expr.contains(left, Score):
        left, right = right, left
    inner = _split(left) if expr.contains(left, Score) else None
    if e.op == "sub" and not expr.contains(right, Score):
        right = apply("neg", right, dtype=e.dtype)
    addend = _split_addend(right)
    if addend is None and inner is None:
        return None
    inner = inner or Split(const(True, "bool"), left, -math.inf)
    if addend is None:
        if expr.contains(right, Score) or inner.fill > ADDED:
            return None
        return Split(inner.predicate, _plus("add", inner.visible, right, e.dtype), inner.fill / 2)
    fill = max(inner.fill / 2, addend.fill / 2)
    return Split(_and(inner.predicate, addend.predicate), _plus("add", inner.visible, addend.visible, e.dtype), fill)


def _split_addend(e: Expr) -> Split | None:
    """A mask that is added, taken apart by the truth values that it is made of."""
    if expr.contains(e, Score):
        return None
    if isinstance(e, Apply) and e.op == "cast":
        return _through(_split_addend(e.operands[0]), lambda x: apply("cast", x, dtype=e.dtype))
    if isinstance(e, Apply) and e.op == "add":
        parts = [_split_addend(x) for x in e.operands]
        if any(parts):
            a, b = (p or Split(const(True, "bool"), x, -math.inf) for p, x in zip(parts, e.operands, strict=True))
            return Split(_and(a.predicate, b.predicate), _plus("add", a.visible, b.visible, e.dtype), max(a.fill, b.fill) / 2)
    split = _split_where(e) if isinstance(e, Apply) and e.op == "where" else _split_product(e)
    return split if split is not None and split.fill <= ADDED else None


def _split_product(e: Expr) -> Split | None:
    """(1 - b) * fill and its like: a formula of one truth value, by its two values."""
    conditions = _outermost_conditions(e)
    if len(conditions) != 1 or e.dtype == "bool":
        return None
    condition = next(iter(conditions))
    yes, no = (_evaluated(expr.substitute(e, {condition: const(v, "bool")})) for v in (True, False))
    if yes is None or no is None:
        return None
    return _split_where(Apply(e.dtype, "where", (condition, const(yes, e.dtype), const(no, e.dtype))))


def _outermost_conditions(e: Expr) -> set[Expr]:
    return {e} if e.dtype == "bool" else set().union(*map(_outermost_conditions, e.args))


def _evaluated(e: Expr) -> float | None:
    """The value of a formula of constants, each step rounded as its dtype says."""
    known: dict[Expr, float] = {}
    arithmetic: dict[str, Callable[..., float]] = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
        "cast": lambda a: a, "where": lambda c, a, b: a if c else b,
    }  # fmt: skip
    for n in expr.walk(e):
        if isinstance(n, Const):
            known[n] = n.value
        elif isinstance(n, Apply) and n.op in arithmetic:
            value = arithmetic[n.op](*(known[a] for a in n.operands))
            rounded = apply("cast", const(value, "float64"), dtype=n.dtype) if n.dtype in expr.FLOATS else const(value, n.dtype)
            known[n] = rounded.value if isinstance(rounded, Const) else value
        else:
            return None
    return known[e]


def _number(e: Expr) -> float | None:
    """The value of a constant, seen through casts; integers and infinities included."""
    while isinstance(e, Apply) and e.op == "cast":
        e = e.operands[0]
    return float(e.value) if isinstance(e, Const) else None


def _through(split: Split | None, f: Callable[[Expr], Expr]) -> Split | None:
    """A split carried through a function that keeps the order of large negative numbers."""
    if split is None:
        return None
    dtype = split.visible.dtype
    fill = _evaluated(f(const(split.fill, dtype)))
    return None if fill is None else Split(split.predicate, f(split.visible), fill)


def _plus(op: str, a: Expr, b: Expr, dtype: str) -> Expr:
    return a if _number(b) == 0.0 and a.dtype == dtype else apply(op, a, b, dtype=dtype)


def _and(a: Expr, b: Expr) -> Expr:
    return apply("and", a, b, dtype="bool")


def _not(e: Expr) -> Expr:
    return apply("not", e, dtype="bool")


def _pushed(e: Expr) -> Expr:
    """Negations moved down to comparisons and loads."""
    if not (isinstance(e, Apply) and e.dtype == "bool"):
        return e
    if e.op in ("and", "or"):
        return apply(e.op, *map(_pushed, e.operands), dtype="bool")
    if e.op != "not" or not isinstance(e.operands[0], Apply):
        return e
    inner = e.operands[0]
    if inner.op in ("and", "or"):
        flipped = "or" if inner.op == "and" else "and"
        return apply(flipped, *(_pushed(_not(x)) for x in inner.operands), dtype="bool")
    if inner.op in _NEGATED and inner.operands[0].dtype not in expr.FLOATS:  # comparisons with NaN are not negated so
        return apply(_NEGATED[inner.op], *inner.operands, dtype="bool")
    return e


def _conjuncts(e: Expr) -> list[Expr]:
    if isinstance(e, Apply) and e.op == "and":
        return list(dict.fromkeys(c for x in e.operands for c in _conjuncts(x)))
    if isinstance(e, Apply) and e.op in ("lt", "le") and isinstance(e.operands[0], Apply) and e.operands[0].op == "abs":
        distance, limit = e.operands[0].operands[0], e.operands[1]
        sides = (distance, apply("neg", distance, dtype=distance.dtype))
        return [apply(e.op, x, limit, dtype="bool") for x in sides]
    if isinstance(e, Apply) and e.op == "eq" and all(x.dtype == "int64" for x in e.operands):
        return _chunk(*e.operands) or _chunk(*e.operands[::-1]) or [e]
    return [] if isinstance(e, Const) and e.value else [e]


def _chunk(block: Expr, other: Expr) -> list[Expr]:
    """k // n == x is n * x <= k < n * x + n."""
    if not (isinstance(block, Apply) and block.op == "floordiv" and expr.axes(block) == {"k"}):
        return []
    k, n = block.operands
    if not (isinstance(n, Const) and n.value > 0):
        return []
    begin = apply("mul", other, n, dtype="int64")
    return [apply("ge", k, begin, dtype="bool"), apply("lt", k, apply("add", begin, n, dtype="int64"), dtype="bool")]


# --------------------------------------------------------------------------------------------------------- loop bounds


def _bound(r: Reader, clause: Expr) -> tuple[str, Expr] | None:
    """("lower", f(q)) if the clause says k >= f(q), ("upper", f(q)) if it says k < f(q), f never decreasing with q."""
    difference = _nonnegative_form(r, clause)
    k, q = sympy.Symbol("k", integer=True), sympy.Symbol("q", integer=True)
    parts = None if difference is None else linear(difference, k)
    if parts is None or parts[0] not in (1, -1):
        return None
    side, limit = ("lower", -parts[1]) if parts[0] == 1 else ("upper", parts[1] + 1)
    found = r.expression(sympy.expand(limit))
    return (side, found) if "k" not in expr.axes(found) and _never_decreases(r, limit, q) else None


def _never_decreases(r: Reader, e: Index, q: sympy.Symbol) -> bool:
    """Sums of nonnegative multiples of q and of floor divisions of such sums; what is read from tensors is not of q."""
    for term in sympy.Add.make_args(sympy.expand(e)):
        coefficient, rest = term.as_coeff_Mul()
        if not term.has(q):
            if q.name in expr.axes(r.expression(term)):
                return False
        elif isinstance(rest, FloorDiv):
            if coefficient < 0 or rest.args[1].has(q) or not _never_decreases(r, rest.args[0], q):
                return False
        elif (parts := linear(term, q)) is None or not r.space.nonnegative(parts[0]):
            return False
    return True


def _nonnegative_form(r: Reader, clause: Expr) -> Index | None:
    """The difference that an integer comparison says is >= 0."""
    if not (isinstance(clause, Apply) and clause.op in ("le", "lt", "ge", "gt")):
        return None
    if any(x.dtype not in expr.INTS for x in clause.operands):
        return None
    a, b = (r.index(x) for x in clause.operands)
    return {"le": b - a, "lt": b - a - 1, "ge": a - b, "gt": a - b - 1}[clause.op]
