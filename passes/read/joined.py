"""Several sets of keys under one softmax: products that are one product with the sets joined.

    cat(q @ a, q @ b) = q @ cat(a, b)          scores that are joined before the softmax
    p @ v + r @ w = cat(p, r) @ cat(v, w)      weights that are taken apart behind it

Keys and values are joined by the graph, in linear memory; scores and weights are read. What differs between the sets, such as
a scale or a mask, becomes a choice by the index of the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cmp_to_key

import sympy
import torch
from torch import Tensor

from fuse.ir import expr
from fuse.ir.expr import Apply, Expr, Load, apply
from fuse.ir.index import IndexExpr, linear, variable
from fuse.passes.predicate import assume
from fuse.passes.read.elements import PRODUCTS, Coords, Opaque, Reader, dims, summed_into, uncast
from fuse.passes.read.products import Product, Side, product_of
from fuse.passes.read.trace import Value, as_size, computed
from fuse.report.reasons import Declined, ScoresJoined

_PLAIN = ("bmm", "mm")
_OVER = variable("d")


@dataclass(frozen=True)
class Joined:
    """``score`` with ``marker`` in the place of the products ``of`` the sets; it stands for ``product``."""

    score: Expr
    marker: Opaque
    product: Product
    of: tuple[Value, ...]


@dataclass(frozen=True)
class _Section:
    """The score of the keys begin <= k < end, the product in it that runs over these keys, and its sides: query, and key at k.

    place     where the product reads the key
    features  how many
    """

    begin: IndexExpr
    end: IndexExpr
    score: Expr
    product: Opaque
    query: Side
    key: Side
    place: IndexExpr
    features: IndexExpr


def joined_scores(r: Reader, score: Expr, q: sympy.Symbol, k: sympy.Symbol) -> Joined | None:
    """The score of several sets of keys as that of one; None where there is one set.

    Raises Declined where the products of the sets are not those of one query.
    """
    apart = list(_apart(r, score, q, k, sympy.Integer(0), r.space.sizes[k]))
    if len(apart) < 2:
        return None
    sections = [_section(r, *given, q, k) for given in apart]
    first = sections[0]
    if len({(_behind_views(r, s.query), s.features) for s in sections}) > 1:
        raise Declined(ScoresJoined("each set of keys has a query of its own"))
    key = _joined_keys(r, sections, k)
    marker = Opaque(first.product.dtype, first.product.value, (*first.product.coords, r.expression(k)))
    out: Expr | None = None
    for section in reversed(sections):
        part = expr.substitute(section.score, {section.product: marker})
        out = part if out is None else apply("where", r.at_most(k + 1, section.end), part, out, dtype=part.dtype)
    assert out is not None
    product = Product(first.product.value, (first.query, key), _OVER)
    return Joined(out, marker, product, tuple(s.product.value for s in sections))


def _apart(
    r: Reader, e: Expr, q: sympy.Symbol, k: sympy.Symbol, begin: IndexExpr, end: IndexExpr
) -> Iterator[tuple[IndexExpr, IndexExpr, Expr]]:
    """The keys by the products that their scores are made of: (begin, end, score)."""
    for condition, at in _borders(r, e, k):
        below, above = (assume(e, condition, value) for value in (True, False))
        own = [_products(below, q, k, at - begin), _products(above, q, k, end - at)]
        if all(own) and own[0].isdisjoint(own[1]):
            yield from _apart(r, below, q, k, begin, at)
            yield from _apart(r, above, q, k, at, end)
            return
    yield begin, end, e


def _products(e: Expr, q: sympy.Symbol, k: sympy.Symbol, size: IndexExpr) -> set[Opaque]:
    """Those of query and key in the score of ``size`` keys; a single key is read at no index."""
    found = {q.name} if sympy.expand(size) == 1 else {q.name, k.name}
    return {n for n in summed_into(e) if n.name in PRODUCTS and found <= expr.axes(n)}


def _borders(r: Reader, e: Expr, k: sympy.Symbol) -> Iterator[tuple[Expr, IndexExpr]]:
    """Conditions that say k < n, with n."""
    for choice in expr.walk(e):
        if not (isinstance(choice, Apply) and choice.op == "where" and isinstance(choice.operands[0], Apply)):
            continue
        condition = choice.operands[0]
        if condition.op == "le" and all(x.dtype == "int64" for x in condition.operands):
            low, high = map(r.index, condition.operands)
            parts = linear(high - low, k)
            if parts is not None and parts[0] == -1 and all(s.name in r.symbols for s in parts[1].free_symbols):
                yield condition, parts[1] + 1


def _section(r: Reader, begin: IndexExpr, end: IndexExpr, score: Expr, q: sympy.Symbol, k: sympy.Symbol) -> _Section:
    place = r.clamped(k - begin, end - begin)
    for n in summed_into(score):
        found = product_of(r, n, _OVER.name) if n.name in _PLAIN else None
        for query, key, at in () if found is None else ((*found.sides, -1), (*found.sides[::-1], -2)):
            here = key[1][at] in (place, 0) and q in set().union(*(c.free_symbols for c in query[1]))
            if here and sympy.expand(dims(key[0])[at] - end + begin) == 0:
                at_k = tuple(k if i == at + len(key[1]) else c for i, c in enumerate(key[1]))
                return _Section(begin, end, score, n, query, (key[0], at_k), place, r.space.sizes[_OVER])
    raise Declined(ScoresJoined(f"those of the keys from {begin} on are no plain product"))


def _behind_views(r: Reader, side: Side) -> Expr:
    """The element of the tensor behind views."""
    return uncast(r.through_views(*side))


def _joined_keys(r: Reader, sections: Sequence[_Section], k: sympy.Symbol) -> Side:
    """The keys of all sections as one tensor, read at k."""
    if len({s.key[0].dtype for s in sections}) > 1:
        raise Declined(ScoresJoined("keys have several dtypes"))
    found = _laid_out(r, sections, k) or _alike(sections, k)
    if found is None:
        raise Declined(ScoresJoined("keys of one set lie in another way than those of another"))
    return found


def _alike(sections: Sequence[_Section], k: sympy.Symbol) -> Side | None:
    """Tensors that are read at the same coordinates, but for the key's."""
    at = sections[0].key[1]
    if any(s.key[1] != at for s in sections):
        return None
    dim = at.index(k) - len(at)

    def joined(*keys: Tensor) -> Tensor:
        if dim == -1:  # features innermost
            return torch.cat([x.mT for x in keys], -2).mT
        return torch.cat(keys, dim)

    return computed([s.key[0] for s in sections], joined), at


def _laid_out(r: Reader, sections: Sequence[_Section], k: sympy.Symbol) -> Side | None:
    """Tensors behind views, each brought to the dimensions that any of them has."""
    loads = [load for s in sections if isinstance(load := _behind_views(r, s.key), Load)]
    places = [at for load, s in zip(loads, sections, strict=False) if (at := _plain_coords(r, load, s, k)) is not None]
    if len(places) < len(sections):
        return None
    axes = sorted({x for at in places for x in at if not x.is_Integer} - {k, _OVER}, key=str)
    values = [r.leaves[load.operand] for load in loads]
    size = [as_size(r.space.sizes[x], values[0]) for x in axes]

    def laid_out(x: Tensor, at: Coords) -> Tensor:
        for i in reversed(range(len(at))):
            x = x.select(i, int(at[i])) if at[i].is_Integer else x
        given = [c for c in at if not c.is_Integer]
        x = x.permute([given.index(c) for c in (*axes, k, _OVER) if c in given])
        for i, c in enumerate((*axes, k)):  # a single key is read at no index
            x = x if c in given else x.unsqueeze(i)
        return x if all(c in given for c in axes) else x.expand(*size, *x.shape[-2:])

    def joined(*keys: Tensor) -> Tensor:
        return torch.cat([laid_out(x, at) for x, at in zip(keys, places, strict=True)], -2)

    return computed(values, joined), (*axes, k, _OVER)


def _plain_coords(r: Reader, load: Load, section: _Section, k: sympy.Symbol) -> Coords | None:
    """Its coordinates, the key's as k, where each is a number or runs over all of a dimension of its own."""
    at = tuple(k if (c := r.index(x)) == section.place else c for x in load.coords)
    sizes = {**r.space.sizes, k: section.end - section.begin}
    named = [c for c in at if not c.is_Integer]
    whole = all(c.is_Integer or (c in sizes and sizes[c] == n) for c, n in zip(at, dims(r.leaves[load.operand]), strict=True))
    needed = {_OVER} if sizes[k] == 1 else {k, _OVER}
    return at if whole and len(named) == len(set(named)) and needed <= set(named) else None


def joined_products(r: Reader, e: Expr) -> Expr:
    """A sum of products over different things as one product over all of them; anything else as it is."""
    terms = list(_terms(e))
    if len(terms) < 2 or not all(isinstance(t, Opaque) and t.name in _PLAIN for t in terms):
        return e
    products = [t for t in terms if isinstance(t, Opaque)]
    products.sort(key=cmp_to_key(lambda a, b: _order(r, a, b)))
    if len({(p.coords, p.dtype) for p in products}) > 1:
        return e
    left, right = ([p.value.args[i] for p in products] for i in (0, 1))

    def product(*sides: Tensor) -> Tensor:
        return _matrices(torch.cat(sides[: len(left)], -1), torch.cat(sides[len(left) :], -2))

    return Opaque(e.dtype, computed([*left, *right], product), products[0].coords)


def _order(r: Reader, a: Opaque, b: Opaque) -> int:
    """-1 where the weights of a lie before those of b, if both were taken from one tensor."""
    first, second = _begin(r, a), _begin(r, b)
    apart = [sympy.expand(sum(second[v]) - sum(first[v])) for v in first if v in second and first[v] != second[v]]
    return 0 if not apart else -1 if r.space.nonnegative(apart[0]) else 1


def _begin(r: Reader, product: Opaque) -> dict[Value, Coords]:
    """Where in which tensors that begins which is summed over."""
    coords = [r.index(c) for c in product.coords]
    left, right = product.value.args[:2]
    t = r.space.add("k", dims(left)[-1])
    sides = (r.element(left, (*coords[:-1], t)), r.element(right, (*coords[:-2], t, coords[-1])))
    read = (n for n in expr.walk(*sides) if isinstance(n, Opaque))
    return {n.value: tuple(r.index(c).subs(t, 0) for c in n.coords) for n in read}


def _matrices(a: Tensor, b: Tensor) -> Tensor:
    """The product, as one call."""
    return torch.bmm(a, b) if a.dim() == 3 else torch.mm(a, b)


def _terms(e: Expr) -> Iterator[Expr]:
    e = uncast(e)
    if isinstance(e, Apply) and e.op == "add":
        for x in e.operands:
            yield from _terms(x)
    else:
        yield e
