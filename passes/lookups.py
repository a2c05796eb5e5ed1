"""What a tensor of positions looks up in a table, as Swin's relative positions, is looked up once for all windows.

Where the place in the table is itself read from a tensor of queries and keys, a tensor of that size exists anyway. If some
batch index takes no part, as the windows do not, the result is loaded as the graph computes it: once per call, where the kernel
would repeat the lookup for each window. Else it would be as large as the scores, and the kernel looks up what it needs.
"""

from __future__ import annotations

from collections.abc import Set

import sympy

from fuse.ir import expr
from fuse.ir.expr import FLOATS, Apply, Const, Expr, Load
from fuse.ir.index import IndexExpr
from fuse.passes.read.elements import Opaque, Reader
from fuse.passes.read.trace import Value


def hoist_lookups(r: Reader, score: Expr, positions: Set[str], batch: Set[str]) -> Expr:
    """``score`` with the lookups that are worth it as loads; ``positions``: the names of q and k,
    ``batch``: of batch indices of several."""
    held: dict[Expr, list[tuple[Value, tuple[IndexExpr, ...]]]] = {}
    for value, coords, e in r.read():
        held.setdefault(e, []).append((value, coords))
    found: dict[Expr, Expr] = {}
    stack = [score]
    while stack:
        e = stack.pop()
        if e in found or e.dtype not in FLOATS:
            continue
        if not batch <= expr.axes(e) and _looks_up(e, positions) and (load := _as_held(r, e, held.get(e, []))) is not None:
            found[e] = load
        elif not isinstance(e, Load):
            stack.extend(e.args)
    return expr.substitute(score, found)


def _looks_up(e: Expr, positions: Set[str]) -> bool:
    """Whether all of e is lookups and arithmetic on them: a choice of a number may be a mask, which is to be read."""
    nodes = list(expr.walk(e))
    if any(isinstance(n, expr.Score) or _chooses_number(n) for n in nodes):
        return False
    return any(isinstance(n, Load) and _reads_places(n, positions) for n in nodes)


def _chooses_number(n: Expr) -> bool:
    return isinstance(n, Apply) and n.op == "where" and n.dtype in FLOATS and any(isinstance(x, Const) for x in n.operands)


def _reads_places(n: Load, positions: Set[str]) -> bool:
    return any(isinstance(x, Load | Opaque) and positions <= expr.axes(x) for c in n.coords for x in expr.walk(c))


def _as_held(r: Reader, e: Expr, values: list[tuple[Value, tuple[IndexExpr, ...]]]) -> Expr | None:
    """The outermost tensor with this element that is not expanded."""
    axes = {sympy.Symbol(name, integer=True) for name in expr.axes(e)}
    fitting = [(v, at) for v, at in values if not (set().union(*(c.free_symbols for c in at)) & r.space.sizes.keys()) - axes]
    return r.load(*fitting[-1]) if fitting else None
