"""Biases of the distance between query and key, such as T5's buckets: computed once for each distance, not for each entry.

A term of the score is a function of the distance where putting q + distance in the place of k leaves no q. The graph then
computes it for the q_len + kv_len - 1 distances that there are, and the kernel loads table[…, k - q + q_len - 1], which lies
along the keys. Ordinary nodes compute the table, so that it can be differentiated, and layers that share a bias share it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy

from fuse.ir import expr
from fuse.ir.expr import COMPARISONS, INTS, Apply, Expr, Load, Prob, Score, apply, const
from fuse.ir.grid import Extent, Grid
from fuse.ir.index import variable
from fuse.ir.operators import OPERATORS
from fuse.ir.spec import AttentionSpec, IntLike, Operand
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.read.elements import Reader, spec_reader
from fuse.passes.read.trace import Value, as_size, computed

CHEAP = 6  # operations for each query and key that cost no more than loading the result
_DISTANCE = "r"  # k - q + q_len - 1
_Q, _K = variable("q"), variable("k")


def tabulate(lifted: Lifted, _: SiteContext) -> Lifted:
    """Costly functions of the distance become loads of tables, each a leaf of its own."""
    spec, leaves = lifted.spec, list(lifted.leaves)
    r = spec_reader(spec)
    q_len, kv_len = r.symbols["q_len"], r.symbols["kv_len"]
    r.space.add(_DISTANCE, q_len + kv_len - 1)
    place = r.expression(_K - _Q + q_len - 1)
    found: dict[Expr, Expr] = {}
    for term, of_distance in _terms(r, spec):
        axes = sorted(expr.axes(of_distance) - {_DISTANCE})
        found[term] = Load(term.dtype, len(leaves), (*map(expr.index, axes), place))
        leaves.append(_table(lifted, of_distance, axes))
    if not found:
        return lifted
    operands = tuple(Operand(len(leaf.shape), leaf.dtype) for leaf in leaves)
    spec = dataclasses.replace(spec, operands=operands).mapped(lambda root: expr.substitute(root, found))
    pruned, read = spec.pruned()
    return dataclasses.replace(lifted, spec=pruned, leaves=tuple(leaves[i] for i in read))


def _terms(r: Reader, spec: AttentionSpec) -> list[tuple[Expr, Expr]]:
    """The largest terms worth a table: (term, the same as a function of the distance). Those beside the mask come first.

    Conditions are left as they are: what they say about the positions tells which tiles are empty.
    """
    found: dict[Expr, Expr] = {}
    stack = [spec.weight, spec.score, *([] if spec.mask is None else [spec.mask.visible])]
    seen: set[Expr] = set()
    while stack:
        e = stack.pop()
        if e in seen or e.dtype == "bool" or not _of_both(e):
            continue
        seen.add(e)
        mixed = any(isinstance(n, (Score, Prob)) or n in found for n in expr.walk(e))
        of_distance = None if mixed or not is_costly(e) else by_distance(r, e)
        if of_distance is None:
            stack.extend(e.args)
        else:
            found[e] = of_distance
    return list(found.items())


def is_costly(e: Expr) -> bool:
    """Whether e takes longer to compute for a query and a key than to load."""
    steps = [n for n in expr.walk(e) if _of_both(n)]
    return len(steps) > CHEAP or any(isinstance(n, Load) or (isinstance(n, Apply) and OPERATORS[n.op].costly) for n in steps)


def _of_both(e: Expr) -> bool:
    return {"q", "k"} <= expr.axes(e) or expr.contains(e, Score) or expr.contains(e, Prob)


def by_distance(r: Reader, e: Expr) -> Expr | None:
    """e as a function of the distance in the place of q and k, None where it also depends on where they are."""
    distance = apply("sub", expr.index(_DISTANCE), r.expression(r.symbols["q_len"] - 1), dtype="int64")
    moved = apply("add", expr.index("q"), distance, dtype="int64")

    def rule(n: Expr) -> Expr | None:
        if n is expr.index("k"):
            return moved
        if not isinstance(n, Apply) or "q" not in expr.axes(n):
            return None
        if n.op in COMPARISONS and all(a.dtype in INTS for a in n.operands):
            difference = sympy.expand(r.index(n.operands[0]) - r.index(n.operands[1]))
            return None if difference.has(_Q) else apply(n.op, r.expression(difference), const(0), dtype="bool")
        return r.expression(r.index(n)) if n.dtype == "int64" else None

    out = expr.rewrite(e, rule)
    return None if "q" in expr.axes(out) else out


def _table(lifted: Lifted, of_distance: Expr, axes: Sequence[str]) -> Value:
    """The tensor of ``of_distance`` over the batch indices ``axes`` and all distances."""
    symbols = zip(lifted.spec.symbols, lifted.sizes, strict=True)
    sizes: dict[str, IntLike] = {name: as_size(n, lifted.leaves[0]) for name, n in symbols}
    lengths: dict[str, Extent] = {axis: (0, sizes["B" + axis[1:]]) for axis in axes}
    lengths[_DISTANCE] = (0, sizes["q_len"] + sizes["kv_len"] - 1)
    return computed(lifted.leaves, lambda *operands: Grid.over(lengths, sizes, operands).evaluate(of_distance).contiguous())
