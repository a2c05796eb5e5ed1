"""Does a site gain by being fused? Without a softmax any two products with something between them are one, those of a layer's
weights, too; what a kernel saves are the scores, which are then neither written nor read. Where it reads what the graph makes
of all scores, the graph writes them, too: a product more, and fewer passes over them.
"""

from __future__ import annotations

import math

from fuse.ir import expr
from fuse.ir.expr import Apply, Expr, Score
from fuse.passes.lift import Lifted
from fuse.passes.read.statistics import made_of_scores
from fuse.passes.read.trace import size_hint
from fuse.report.reasons import ChainOfProducts, Declined, NothingSaved

_PASSES = 4  # over the scores: those that a mask, a softmax and a second product take, where something else is made of them


def check_pays(lifted: Lifted, across_ranks: bool = False) -> None:
    """Raises Declined where nothing would be saved, or the products may better be taken in another order.

    across_ranks  the sequence lies on several: what is attention cannot be left, however little it would save of a shard
    """
    spec = lifted.spec
    sizes = [size_hint(n, lifted.leaves[0]) for n in lifted.sizes]
    q_len, kv_len = sizes[spec.batch : spec.batch + 2]
    shape = f"{math.prod(sizes[: spec.batch])} x {q_len} x {kv_len}"
    scores = q_len * kv_len
    if made_of_scores(lifted.leaves, lifted.scores) and _PASSES * scores < (q_len + kv_len) * spec.qk_dim:
        raise Declined(NothingSaved(f"{shape} scores have to be there beforehand, of many more queries and keys"))
    if spec.softmax:
        return
    if _is_product(spec.score):
        raise Declined(ChainOfProducts())
    if not across_ranks and scores < (q_len + kv_len) * (spec.qk_dim + spec.v_dim):
        raise Declined(NothingSaved(f"{shape} scores are fewer numbers than queries, keys, values and result are"))


def _is_product(e: Expr) -> bool:
    """Is it the product of query and key, times what could as well be multiplied to either?"""
    if isinstance(e, Score):
        return True
    if not isinstance(e, Apply) or e.op not in ("cast", "mul", "div"):
        return False
    a, *rest = e.operands
    if e.op == "mul" and not expr.contains(a, Score):
        a, rest = rest[0], [a]
    return _is_product(a) and all(not {"q", "k"} <= expr.axes(b) and not expr.contains(b, Score) for b in rest)
