"""Pieces of a tensor: parts that were joined, or written into it at some place. What it holds at index c, a piece that begins
at b holds at c - b.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from fuse.ir.expr import Expr, Index, Load, substitute, walk
from fuse.ir.index import IndexExpr
from fuse.passes.read.elements import Coords, Opaque, Reader, dims
from fuse.passes.read.trace import Value


def read_piece(r: Reader, piece: Value, coords: Coords, dim: int, at: IndexExpr) -> Expr:
    """The element of ``piece`` at ``coords``, with ``at`` in dimension ``dim``.

    A condition around it discards what is read where ``at`` lies outside of the piece.
    """
    n = dims(piece)[dim]
    if _inside(r, at, n):
        return r.element(piece, (*coords[:dim], at, *coords[dim + 1 :]))
    place = r.space.add(f"t{len(r.space.sizes)}", n)
    if at.free_symbols & r.inner:
        r.inner.add(place)
    return _moved(r, r.element(piece, (*coords[:dim], place, *coords[dim + 1 :])), place, at)


def as_others(r: Reader, e: Expr, others: Sequence[Expr], at: IndexExpr, only: IndexExpr) -> Expr:
    """The element of a piece of one, which is read where ``at`` is ``only``, in the terms of other pieces: x[9] as x[at]."""
    (index,) = at.free_symbols if len(at.free_symbols) == 1 and at.is_Symbol else (None,)
    if index is None:
        return e
    own = [n for n in walk(e) if isinstance(n, Opaque)]
    theirs = [n for n in walk(*others) if isinstance(n, Opaque) and n not in own]

    def same(a: Opaque, b: Opaque) -> bool:
        return a.value is b.value and all(
            r.index(x) == r.index(y).subs(index, only) for x, y in zip(a.coords, b.coords, strict=True)
        )

    return substitute(e, {a: b for a in own for b in theirs if same(a, b)})


def _moved(r: Reader, e: Expr, place: sympy.Symbol, to: IndexExpr) -> Expr:
    """e at another place; no tensor is read outside of it."""

    moved: dict[Expr, Expr] = {}
    for n in walk(e):
        if isinstance(n, Index):
            moved[n] = r.expression(to) if n.axis == place.name else n
        elif all(moved[a] is a for a in n.args):
            moved[n] = n
        elif isinstance(n, (Load, Opaque)):
            shape = dims(r.leaves[n.operand] if isinstance(n, Load) else n.value)
            at = ((c, moved[c], size) for c, size in zip(n.coords, shape, strict=True))
            moved[n] = n.with_args(tuple(c if c is to else r.expression(r.clamped(r.index(to), size)) for c, to, size in at))
        else:
            moved[n] = n.with_args(tuple(moved[a] for a in n.args))
    return moved[e]


def _inside(r: Reader, at: IndexExpr, n: IndexExpr) -> bool:
    return r.space.nonnegative(at) and r.space.nonnegative(n - 1 - at)
