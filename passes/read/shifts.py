"""What is subtracted from every exponent of a row alike cancels: exp(s - m) / (sum of exp(s - m) + exp(z - m)) is the softmax
of s in which a logit z takes part, whatever m is.

Exponents are read as sums of terms. Those are dropped that all exponents of a row share, do not differ by key, and are made of
the scores by a reduction, such as their maximum, clamped or detached: all scores would have to be there before the first could
be used. What is not made of the scores stays: a mask that hides whole rows is such a term, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import sympy

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, apply, const
from fuse.passes.predicate import REPLACED
from fuse.passes.read.elements import Opaque, Reader, Stopped, uncast
from fuse.passes.read.trace import depends_on

# Reductions that are finite where only some of the scores are -inf; a mean makes all of such a row NaN.
_FINITE = ("amax", "max", "logsumexp")


@dataclass(frozen=True)
class Term:
    """An addend of a sum, or with ``negative`` a subtrahend; ``factors``: what multiplies and divides it, in their order."""

    leaf: Expr
    negative: bool = False
    factors: tuple[tuple[str, Expr], ...] = ()


def without_shift(r: Reader, exponents: Sequence[Expr], k: sympy.Symbol) -> list[Expr]:
    """``exponents`` without what may be dropped from all of them; the first is that of the keys."""
    first, *others = exponents
    scores = [n for n in expr.walk(first) if isinstance(n, Opaque) and k.name in expr.axes(n)]
    shared = Counter(
        {t: n for t, n in _terms(first, k).items() if k.name not in expr.axes(t.leaf) and _is_of_scores(r, t.leaf, scores)}
    )
    shared = reduce(lambda found, e: found & _terms(e, k), others, shared)
    return [const(0.0, e.dtype) if (left := _without(e, shared, k)) is None else left for e in exponents]


def subtracts(exponent: Expr, score: Expr, m: Expr | None, k: sympy.Symbol) -> bool:
    """Is ``exponent`` the score less m, or with None the score?"""
    return _terms(exponent, k) - _terms(score, k) == Counter([] if m is None else [Term(uncast(m), negative=True)])


def _is_of_scores(r: Reader, e: Expr, scores: Sequence[Opaque]) -> bool:
    """Is e made of the scores, and no mask? A mask chooses a number that hides a row, by being added or subtracted."""
    e = uncast(e)
    if isinstance(e, Stopped):
        return _is_of_scores(r, r.behind(e), scores)
    if isinstance(e, Opaque):
        return e.name in _FINITE and e.value.output == 0 and any(depends_on(e.value, s.value) for s in scores)
    greatest = isinstance(e, Apply) and e.op == "maximum"  # it is no lower than any of its operands
    numbers = [a for a in e.args if a.dtype != "bool"]
    given = [a.value for a in numbers if isinstance(a, Const)]
    if not isinstance(e, Apply) or any(x >= -REPLACED or (x <= REPLACED and not greatest) for x in given):
        return False
    others = [_is_of_scores(r, a, scores) for a in numbers if not isinstance(a, Const)]
    return any(others) if greatest else bool(others) and all(others)


def _terms(e: Expr, k: sympy.Symbol) -> Counter[Term]:
    """The terms of a sum, with how often each is in it; of a choice those of both its sides, where -inf has any."""
    if isinstance(e, Apply) and e.op == "where" and k.name in expr.axes(e):
        sides = [_terms(x, k) for x in _finite_sides(e)]
        return reduce(lambda a, b: a & b, sides) if sides else Counter()
    found: Counter[Term] = Counter()
    parts = _parts(e, k)
    for part, seen in parts:
        for term, count in _terms(part, k).items():
            found[seen(term)] += count
    return found if parts else Counter([Term(uncast(e))])


def _without(e: Expr, dropped: Counter[Term], k: sympy.Symbol) -> Expr | None:
    """e less the terms ``dropped``, all of which it has; None where nothing is left."""
    if not dropped:
        return e
    if isinstance(e, Apply) and e.op == "where" and k.name in expr.axes(e):
        sides = [x if x not in _finite_sides(e) else _without(x, dropped, k) for x in e.operands[1:]]
        return apply("where", e.operands[0], *(const(0.0, e.dtype) if x is None else x for x in sides), dtype=e.dtype)
    parts = _parts(e, k)
    if not parts:
        return None
    assert isinstance(e, Apply)
    left: dict[Expr, Expr | None] = {}
    rest = dropped
    for part, seen in parts:
        own = Counter({t: min(n, rest[seen(t)]) for t, n in _terms(part, k).items() if rest[seen(t)]})
        rest = rest - Counter({seen(t): n for t, n in own.items()})
        left[part] = _without(part, own, k)
    return _rebuilt(e, left)


def _rebuilt(e: Apply, left: dict[Expr, Expr | None]) -> Expr | None:
    """e of what is ``left`` of its parts."""
    operands = tuple(left.get(x, x) for x in e.operands)
    there = tuple(x for x in operands if x is not None)
    if len(there) == len(operands):
        return e.with_args(there)
    if e.op not in ("add", "sub") or not there:
        return None
    return apply("neg", *there, dtype=e.dtype) if e.op == "sub" and operands[0] is None else there[0]


def _finite_sides(choice: Apply) -> list[Expr]:
    """What is chosen from, but for -inf, of which anything may be subtracted."""
    return [x for x in choice.operands[1:] if not (isinstance(x, Const) and x.value == -float("inf"))]


def _parts(e: Expr, k: sympy.Symbol) -> list[tuple[Expr, Callable[[Term], Term]]]:
    """The operands of which e is linear, each with what becomes of its terms; none where e is a term itself."""
    if not isinstance(e, Apply):
        return []
    a, b = (*e.operands, e.operands[0])[:2]
    if e.op == "add" and a is not b:
        return [(a, _same), (b, _same)]
    if e.op == "sub" and a is not b:
        return [(a, _same), (b, _negated)]
    if e.op == "neg":
        return [(a, _negated)]
    if e.op == "cast" and a.dtype in expr.FLOATS and e.dtype in expr.FLOATS:
        return [(a, _same)]
    if e.op == "mul" and isinstance(a, Const):
        a, b = b, a
    if e.op in ("mul", "div") and k.name not in expr.axes(b):
        return [(a, _scaled(e.op, b))]
    return [(b, _scaled("mul", a))] if e.op == "mul" and k.name not in expr.axes(a) else []


def _same(term: Term) -> Term:
    return term


def _negated(term: Term) -> Term:
    return replace(term, negative=not term.negative)


def _scaled(op: str, by: Expr) -> Callable[[Term], Term]:
    return lambda term: replace(term, factors=(*term.factors, (op, by)))
