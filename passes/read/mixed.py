"""Talking heads: a product that sums over heads, before or behind the softmax, where attention sums over features or keys."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from torch import Tensor
from torch.fx import Node

from fuse.ir import expr
from fuse.ir.expr import Expr, Load
from fuse.ir.index import IndexExpr
from fuse.passes.find import is_contraction
from fuse.passes.read.elements import Opaque, Reader, as_index, summed_into
from fuse.passes.read.graph import tensor_of
from fuse.passes.read.products import Product, product_of
from fuse.passes.read.trace import Value
from fuse.report.reasons import Declined, HeadsMixed

_STEPS = 16  # between scores and the product that they are made of


def check_before(r: Reader, product: Product, k: sympy.Symbol) -> None:
    """Raises Declined where ``product``, which the scores are made of, mixes those of several heads."""
    if _mixes(r, product, k):
        raise Declined(HeadsMixed("before"))


def check_behind(r: Reader, score: Expr, t: sympy.Symbol, k: sympy.Symbol) -> None:
    """Raises Declined where t, which a product behind the softmax over k sums over, counts heads of ``score``."""
    products = [p for n in summed_into(score) if (p := product_of(r, n, "d")) is not None]
    if any(_mixes(r, p, k) for p in products):
        raise Declined(HeadsMixed("before and behind"))
    if any(all(t in _free(coords) for _, coords in p.sides) for p in products):
        raise Declined(HeadsMixed("behind"))


def _mixes(r: Reader, product: Product, k: sympy.Symbol) -> bool:
    """Is one side scores, of which there are some for each index that is summed over?"""
    needed = {k.name, product.over.name}
    found = (n for side in product.sides for n in expr.walk(r.element(*side)) if isinstance(n, (Load, Opaque)))
    values = [r.leaves[n.operand] if isinstance(n, Load) else n.value for n in found if needed <= expr.axes(n)]
    return any(_are_scores(r, v) for v in values)


def _are_scores(r: Reader, v: Value) -> bool:
    """Is it the result of a product, or computed from that entry by entry?"""
    node = v.origin or (r.held.get(v) if isinstance(r.held, Mapping) else None)
    waiting, seen = [node], set[Node | None]()
    while waiting and len(seen) < _STEPS:
        n = waiting.pop(0)
        if isinstance(n, Node) and n not in seen:
            seen.add(n)
            made = tensor_of(n)
            if is_contraction(n) and made is not None and _count(made) == _count(v.meta):
                return True
            waiting += n.all_input_nodes
    return False


def _count(x: Tensor) -> IndexExpr:
    """How many elements it has."""
    return sympy.expand(sympy.prod(as_index(n) for n in x.shape))


def _free(coords: tuple[IndexExpr, ...]) -> set[sympy.Symbol]:
    return set().union(*(c.free_symbols for c in coords))
