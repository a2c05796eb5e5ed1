"""Which batch indices read the same keys and the same values: grouped and multi-query attention, whatever the layout."""

from __future__ import annotations

import math
from functools import cache

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Index, index
from fuse.ir.spec import AttentionSpec

ALL = 0


@cache
def runs(spec: AttentionSpec) -> tuple[int, ...]:
    """For each batch dimension, the length of the runs of indices that share keys and values; ALL if all of them do.

    Runs are aligned: indices i and j share where i // run == j // run and the other batch indices are equal.
    """
    coords = (*spec.key.coords, *spec.value.coords)
    return tuple(math.gcd(*(_run(c, index(f"b{i}")) for c in coords)) for i in range(spec.batch))


def _run(node: Expr, axis: Index) -> int:
    """Indices within such runs give ``node`` one value; 0 where the index does not matter."""
    if node is axis:
        return 1
    if (divisor := _divisor(node)) and node.args[0] is axis:
        return divisor
    return math.gcd(*(_run(a, axis) for a in node.args))


def _divisor(node: Expr) -> int:
    """c of x // c; else 0."""
    if not (isinstance(node, Apply) and node.op == "floordiv" and isinstance(node.operands[1], Const)):
        return 0
    return max(0, int(node.operands[1].value))


def grouped(spec: AttentionSpec) -> AttentionSpec:
    """``spec`` over indices g0, g1, … of runs beside those of the batch: b0 // run is g0. No longer a spec by ``verify``."""
    groups = {index(f"b{i}"): (index(f"g{i}"), run) for i, run in enumerate(runs(spec)) if run > 1}

    def rule(node: Expr) -> Expr | None:
        if not (divisor := _divisor(node)) or node.args[0] not in groups:
            return None
        group, run = groups[node.args[0]]
        if divisor % run:
            return None
        return group if divisor == run else expr.apply("floordiv", group, expr.const(divisor // run), dtype="int64")

    return spec.mapped(lambda node: expr.rewrite(node, rule))
