"""What is made of the scores and read by them again, such as their maximum below a clamp: a number of each row, of each key or
of all. All scores have to be there before the first is used, so the graph computes it, of scores of its own.

The kernel computes the scores anew, and by another order of sums: what it makes of both must not depend on whether a score is
exactly the number that was made of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from fuse.ir import expr
from fuse.ir.expr import FLOATS, Apply, Const, Expr, Load, Score
from fuse.passes.predicate import REPLACED
from fuse.passes.read.elements import Reader, op_name
from fuse.passes.read.trace import Value, depends_on
from fuse.report.reasons import Declined, ScoresUsed

# What changes with its operands by no more than they do, and its derivative, too
_SMOOTH = {"add", "sub", "neg", "mul", "cast", "exp", "tanh", "sigmoid"}
_CLAMPS = {"maximum", "minimum"}


def made_of_scores(leaves: Sequence[Value], scores: Sequence[Value]) -> bool:
    """Does any of ``leaves`` hold what was made of ``scores``?"""
    return any(depends_on(leaf, s) for leaf in leaves for s in scores)


def check_statistics(
    r: Reader, logits: Sequence[Expr], weight: Expr, scores: Sequence[Value], q: sympy.Symbol, k: sympy.Symbol
) -> None:
    """Raises Declined where what is made of ``scores`` is one of each entry, or meets them where a rounding matters.

    logits  the score and the extra logits, with Score in the place of the product that gives ``scores``
    weight  may hold nothing of the kind: who knows a row's weights, or their sum, has computed all of attention but a product
    """
    entry = {x.name for x in (q, k) if r.space.sizes[x] != 1}
    if found := [r.leaves[i] for i in expr.operands(weight) if made_of_scores([r.leaves[i]], scores)]:
        raise Declined(ScoresUsed(op_name(found[0])))
    made: dict[Expr, Value] = {}  # what depends on a statistic, with one that it depends on
    of_score: set[Expr] = set()
    for n in expr.walk(*logits):
        if isinstance(n, Load) and made_of_scores([r.leaves[n.operand]], scores):
            made[n] = r.leaves[n.operand]
            if n.dtype not in FLOATS or entry <= expr.axes(n):
                raise Declined(ScoresUsed(op_name(made[n])))
        statistics, meets = [made[a] for a in n.args if a in made], any(a in of_score for a in n.args)
        if statistics:
            made[n] = statistics[0]
        if isinstance(n, Score) or meets:
            of_score.add(n)
        if statistics and meets and not _is_smooth(n, made.keys() & of_score):
            raise Declined(ScoresUsed(op_name(statistics[0])))


def _is_smooth(n: Expr, both: set[Expr]) -> bool:
    """``both``: what scores and statistics meet in."""
    if not isinstance(n, Apply) or n.dtype not in FLOATS:
        return False
    if n.op in _CLAMPS:  # a bound that no score is near
        return any(isinstance(a, Const) and abs(a.value) >= -REPLACED for a in n.operands)
    if n.op == "where":
        return n.operands[0] not in both
    return n.op in _SMOOTH or (n.op == "div" and n.operands[1] not in both)
