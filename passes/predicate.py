"""Which entries of the scores are masked: a score is separated into a predicate and what is visible, by cases.

A mask is a truth value under which the score is a large negative number, however that was written: where, masked_fill, an
addend, a product, a maximum. So the truth values in a score are tried: if the score that is left under one of its two values
can only be a large negative number (``intervals``), entries where it has that value are masked, and the rest goes on with
the other value. Tensors that are read for several heads count likewise, by whether they hold 0, 1, or a large negative number.
Without a softmax, what is masked is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, reduce

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Load, Score, apply, const, index
from fuse.ir.interval import Range
from fuse.passes.intervals import constant, highest, largest, value_range

# A score of this size vanishes beside any score above it by 256.
REPLACED = -1e3
_LOWEST = -float("inf")
_TRUE, _FALSE = const(True, "bool"), const(False, "bool")
_ZERO_SIGN_MATTERS = ("div", "reciprocal", "rsqrt", "pow")
_TABLE = 4  # truth values whose combinations are all looked at
_ATTEMPTS = 400  # assumptions tried per score, after which what was found is all


@dataclass(frozen=True)
class Split:
    """The score is ``visible`` where ``predicate`` holds and at most ``fill`` elsewhere; without a softmax it is zero there."""

    predicate: Expr
    visible: Expr
    fill: float


@lru_cache(maxsize=256)
def separate(score: Expr, batch: int, softmax: bool = True) -> Split | None:
    """The masks in a score over ``batch`` batch indices; None where nothing is masked."""
    found = _Separation(batch, softmax).split(_plain(score))
    return found and Split(found.predicate, _without_zeros(found.visible), found.fill if softmax else 0.0)


@dataclass
class _Separation:
    """One score's cases. ``attempts`` bounds them; ``settled`` is data that was looked at."""

    batch: int
    softmax: bool = True
    attempts: int = _ATTEMPTS
    settled: set[Expr] = field(default_factory=set)

    def split(self, e: Expr) -> Split | None:
        if self._vanishes(highest(e), e):
            return Split(_FALSE, e, highest(e))
        return next((found for case in CASES.values() if (found := case(self, e)) is not None), None)

    def by_truth(self, e: Expr) -> Split | None:
        """A truth value of which one alone masks."""
        for condition in _conditions(e):
            for value in (True, False):
                hidden = assume(e, condition, value)
                if self._vanishes(top := self._highest(hidden), hidden):
                    visible = _not(condition) if value else condition
                    return self._and(visible, top, assume(e, condition, not value))
        return None

    def by_data(self, e: Expr) -> Split | None:
        """A tensor shared by heads whose element masks by being 0, 1, or so low that no score makes up for it."""
        for addend in _without_score(e):
            loads = [n for n in expr.walk(addend) if isinstance(n, Load) and n.dtype != "bool"]
            if addend in self.settled or not loads or not self._shared(addend):
                continue
            self.settled.add(addend)
            tops = dict(self._values(e, loads)) or (dict(self._low(e, addend)) if self.softmax else {})
            if tops:
                return self._and(_every(list(tops)), max(tops.values()), e)
        return None

    def _values(self, e: Expr, loads: list[Load]) -> Iterator[tuple[Expr, float]]:
        """What must hold for an entry to be visible, and the highest score where it does not, if it vanishes there."""
        for load in loads:
            for value in (const(0, load.dtype), const(1, load.dtype)):
                hidden = _folded(e, {load: value})
                if self._vanishes(top := self._highest(hidden), hidden):
                    yield apply("ne", load, value, dtype="bool"), top

    def _low(self, e: Expr, addend: Expr) -> Iterator[tuple[Expr, float]]:
        """The same for an addend that is low; NaN is visible, since it is not below the limit."""
        limit = -2 * max(largest(n.dtype) for n in expr.walk(e) if isinstance(n, Score))
        if value_range(addend).low <= limit:
            limit = expr.rounded(limit, addend.dtype)
            low = apply("le", addend, const(limit, addend.dtype), dtype="bool")
            if (top := self._highest(e, {addend: Range(_LOWEST, limit)})) <= REPLACED:
                yield _not(low), top

    def _shared(self, addend: Expr) -> bool:
        """Is it the same for several heads? The last batch index counts heads, or is divided by their number."""
        if self.batch == 0:
            return False
        head = f"b{self.batch - 1}"

        def undivided(n: Expr) -> Expr | None:
            return const(0) if isinstance(n, Apply) and n.op == "floordiv" and n.operands[0] is index(head) else None

        return head not in expr.axes(expr.rewrite(addend, undivided))

    def by_both_values(self, e: Expr) -> Split | None:
        """A truth value that does not mask by itself: its two cases apart."""
        for condition in _conditions(e):
            cases = [assume(e, condition, value) for value in (True, False)]
            if self.attempts <= 0 or not any(_conditions(case) for case in cases):
                continue
            yes, no = (self.split(case) or Split(_TRUE, case, _LOWEST) for case in cases)
            if yes.predicate is not _TRUE or no.predicate is not _TRUE:
                visible = [_choice(condition, a, b) for a, b in ((yes.predicate, no.predicate), (yes.visible, no.visible))]
                return Split(visible[0], visible[1], max(yes.fill, no.fill))
        return None

    def _and(self, visible: Expr, fill: float, rest: Expr) -> Split:
        inner = self.split(rest) or Split(_TRUE, rest, _LOWEST)
        visible = assume(visible, inner.predicate, True)  # of a and b, b matters where a holds
        return Split(apply("and", inner.predicate, visible, dtype="bool"), inner.visible, max(inner.fill, fill))

    def _vanishes(self, top: float, e: Expr) -> bool:
        """Whether an entry of the score e, which is at most ``top``, has no weight."""
        return top <= REPLACED if self.softmax else top == 0 and value_range(e).low == 0

    def _highest(self, e: Expr, known: dict[Expr, Range] | None = None) -> float:
        self.attempts -= 1
        return highest(e, known or {}) if self.attempts > 0 else -_LOWEST


CASES = {
    "a truth value masks": _Separation.by_truth,
    "a shared tensor masks": _Separation.by_data,
    "either value of a truth": _Separation.by_both_values,
}


# ------------------------------------------------------------------------------------------------------ assumptions


def assume(e: Expr, condition: Expr, value: bool) -> Expr:
    """``e`` where the truth value ``condition`` is ``value``."""
    return _folded(e, dict(_implied(condition, value)))


def _implied(condition: Expr, value: bool) -> Iterator[tuple[Expr, Expr]]:
    """A conjunction that holds tells of its parts, as a disjunction that does not."""
    yield condition, const(value, "bool")
    if isinstance(condition, Apply) and condition.op == "not":
        yield from _implied(condition.operands[0], not value)
    if isinstance(condition, Apply) and condition.op == ("and" if value else "or"):
        for part in condition.operands:
            yield from _implied(part, value)


def _folded(e: Expr, table: dict[Expr, Expr]) -> Expr:
    return expr.rewrite(e, lambda n: table.get(n) or constant(n))


def _plain(e: Expr) -> Expr:
    """Truth values that were computed by way of numbers, such as (1 - float(a)) * float(b) != 0, in terms of truth values."""

    def rule(n: Expr) -> Expr | None:
        if n.dtype != "bool" or not isinstance(n, Apply) or n.op not in (*expr.COMPARISONS, "cast", "isnan", "isinf"):
            return constant(n)
        conditions = list(dict.fromkeys(c for a in n.operands for c in _conditions(a)))
        return _by_cases(n, conditions) if 0 < len(conditions) <= _TABLE else None

    return expr.rewrite(e, rule)


def _by_cases(n: Expr, conditions: list[Expr]) -> Expr | None:
    """The truth table of ``n``, where no more than one of its cases is left to be computed."""
    open_cases: list[Expr] = []

    def table(case: Expr, conditions: list[Expr]) -> Expr:
        if isinstance(case, Const) or not conditions:
            open_cases.extend(() if isinstance(case, Const) else (case,))
            return case
        condition, *rest = conditions
        yes, no = (table(assume(case, condition, value), rest) for value in (True, False))
        return _choice(condition, yes, no)

    found = table(n, conditions)
    return found if len(open_cases) <= 1 else None


def _conditions(e: Expr) -> list[Expr]:
    """The outermost truth values in ``e`` that do not depend on the score."""
    free = _free_of_score(e)
    found: dict[Expr, None] = {}
    seen: set[Expr] = set()
    stack = [e]
    while stack:
        n = stack.pop()
        if n in seen or isinstance(n, Const):
            continue
        seen.add(n)
        if n.dtype == "bool" and n in free:
            found[n] = None
        else:
            stack.extend(reversed(n.args))
    return list(found)


def _without_score(e: Expr) -> list[Expr]:
    """The outermost floats in ``e`` that do not depend on the score and are not constant."""
    free = _free_of_score(e)
    users = [n for n in expr.walk(e) if n not in free]
    parts = [a for n in users for a in n.args if a in free and a.dtype in expr.FLOATS and not isinstance(a, Const)]
    return list(dict.fromkeys(parts))


def _free_of_score(e: Expr) -> set[Expr]:
    free: set[Expr] = set()
    for n in expr.walk(e):
        if not isinstance(n, Score) and all(a in free for a in n.args):
            free.add(n)
    return free


def _choice(condition: Expr, a: Expr, b: Expr) -> Expr:
    return apply("where", condition, a, b, dtype=a.dtype)


def _not(e: Expr) -> Expr:
    return apply("not", e, dtype="bool")


def _every(terms: list[Expr]) -> Expr:
    return reduce(lambda a, b: apply("and", a, b, dtype="bool"), terms)


def _without_zeros(visible: Expr) -> Expr:
    """Zeros added by masks that do not apply are dropped: only the sign of a zero can tell, and it has to matter."""
    if any(
        isinstance(n, Apply) and n.op in _ZERO_SIGN_MATTERS and not isinstance(n.args[-1], Const) for n in expr.walk(visible)
    ):
        return visible

    def rule(n: Expr) -> Expr | None:
        if isinstance(n, Apply) and n.op == "add":
            for this, other in (n.operands, n.operands[::-1]):
                if isinstance(this, Const) and this.value == 0:
                    return other
        return None

    return expr.rewrite(visible, rule)
