"""Index algebra: views as maps between index expressions, and proofs about their ranges.

Index expressions are sympy polynomials over loop indices, sizes and opaque integers, with floor divisions and remainders
where a view splits what is no multiple. Everything here holds for all sizes; what cannot be proved is answered by "no".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy

from fuse.torch_private import FloorDiv, Mod, PythonMod

IndexExpr: TypeAlias = Any  # a sympy.Expr; sympy has no types
Shape = Sequence[IndexExpr]
_DIVISIONS = (FloorDiv, Mod, PythonMod)


def variable(name: str) -> sympy.Symbol:
    """A loop index, or an integer read from a tensor."""
    return sympy.Symbol(name, integer=True)


def size_symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def place_symbol(name: str) -> sympy.Symbol:
    """A position in a sequence."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@dataclass
class Space:
    """The loop indices in scope: each variable x runs over 0 <= x < size."""

    sizes: dict[sympy.Symbol, IndexExpr] = field(default_factory=dict)
    _nonnegative: dict[IndexExpr, bool] = field(default_factory=dict)

    def add(self, name: str, size: IndexExpr) -> sympy.Symbol:
        x = variable(name)
        self.sizes[x] = sympy.sympify(size)
        self._nonnegative.clear()
        return x

    def nonnegative(self, e: IndexExpr) -> bool:
        """Is e >= 0 for all indices in range and all sizes >= 1? False means not proved."""
        e = sympy.expand(e)
        if e not in self._nonnegative:
            self._nonnegative[e] = self._prove_nonnegative(e)
        return self._nonnegative[e]

    def _prove_nonnegative(self, e: IndexExpr) -> bool:
        e, sizes = self._divisions_as_variables(e)
        for x in sorted(e.free_symbols & sizes.keys(), key=str):
            if not e.has(x):
                continue
            slope = sympy.expand(e.diff(x))
            if slope.has(x):
                return False
            if _sizes_nonnegative(slope, sizes):
                e = sympy.expand(e.subs(x, 0))
            elif _sizes_nonnegative(-slope, sizes):
                e = sympy.expand(e.subs(x, sizes[x] - 1))
            else:
                return False
        return _sizes_nonnegative(e, sizes)

    def _divisions_as_variables(self, e: IndexExpr) -> tuple[IndexExpr, dict[sympy.Symbol, IndexExpr]]:
        """Each floor division or remainder by a positive n becomes a variable with the range that it can have."""
        sizes = dict(self.sizes)
        while divisions := [d for d in e.atoms(*_DIVISIONS) if not any(a.has(*_DIVISIONS) for a in d.args)]:
            d = divisions[0]
            x = sympy.Dummy(integer=True)
            inner, n = d.args
            if not n.is_positive:
                return sympy.Symbol("unknown", integer=True), sizes
            if isinstance(d, FloorDiv):
                upper = self.upper(inner)
                if upper is None or not self.nonnegative(inner):
                    return sympy.Symbol("unknown", integer=True), sizes
                known = upper.is_Integer and n.is_Integer
                sizes[x] = (sympy.Integer(int(upper) // int(n)) if known else upper) + 1  # what is divided, at most
            else:
                sizes[x] = n
            e = e.subs(d, x)
        return e, sizes

    def upper(self, e: IndexExpr) -> IndexExpr | None:
        """The largest value of e where it is linear with constant slopes, else None."""
        e = sympy.expand(e)
        for x in sorted(e.free_symbols & self.sizes.keys(), key=str):
            slope = sympy.expand(e.diff(x))
            if not slope.is_Integer:
                return None
            e = sympy.expand(e.subs(x, self.sizes[x] - 1 if slope > 0 else 0))
        return None if e.has(*_DIVISIONS) else e

    def floordiv(self, e: IndexExpr, n: IndexExpr) -> IndexExpr:
        """e // n with what divides taken out, and nothing left where the rest is proved to lie in [0, n)."""
        whole, rest, proved = self._divide(e, n)
        return whole if proved else whole + FloorDiv(rest, n)

    def mod(self, e: IndexExpr, n: IndexExpr) -> IndexExpr:
        _, rest, proved = self._divide(e, n)
        return rest if proved else PythonMod(rest, n)

    def _divide(self, e: IndexExpr, n: IndexExpr) -> tuple[IndexExpr, IndexExpr, bool]:
        """(whole, rest, whether rest is proved to lie in [0, n)) with e == whole * n + rest."""
        whole, rest = self._taken_out(e, n)
        for more, less in ((sympy.Integer(0), rest), _rounded(rest, n)):
            if less == 0 or (self.nonnegative(less) and self.nonnegative(n - 1 - less)):
                return whole + more, less, True
        return whole, rest, False

    def _taken_out(self, e: IndexExpr, n: IndexExpr) -> tuple[IndexExpr, IndexExpr]:
        """(whole, rest) with e == n * whole + rest, each term by the first of DIVISIONS that fits."""
        whole, rest = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(e)):
            quotient, left = next((x for rule in DIVISIONS.values() if (x := rule(term, n)) is not None), (0, term))
            whole += quotient
            rest += left
        return whole, rest

    def reshape(self, coords: Sequence[IndexExpr], shape: Shape, source: Shape) -> tuple[IndexExpr, ...]:
        """Coordinates in ``source`` of the element that a row-major reshape to ``shape`` puts at ``coords``.

        Dimensions are grouped where the products of sizes meet, so that untouched dimensions keep their index.
        """
        out: list[IndexExpr] = []
        i = j = 0
        while i < len(shape) or j < len(source):
            i1, j1 = _next_group(shape, i, source, j)
            out += self.unflatten(self.flatten(coords[i:i1], shape[i:i1]), source[j:j1])
            i, j = i1, j1
        return tuple(out)

    def flatten(self, coords: Sequence[IndexExpr], shape: Shape) -> IndexExpr:
        flat: IndexExpr = sympy.Integer(0)
        for c, n in zip(coords, shape, strict=True):
            flat = flat * n + c
        return _rejoined(sympy.expand(flat))

    def unflatten(self, flat: IndexExpr, shape: Shape) -> list[IndexExpr]:
        coords: list[IndexExpr] = []
        for n in reversed(shape[1:]):
            coords.append(self.mod(flat, n) if n != 1 else sympy.Integer(0))
            flat = self.floordiv(flat, n) if n != 1 else flat
        return [flat, *reversed(coords)] if shape else []


def _rounded(rest: IndexExpr, n: IndexExpr) -> tuple[IndexExpr, IndexExpr]:
    """Coefficients divided to the nearest: 153 * q + k + 77 by 154 is q and k - q + 77, as relative shifts have it."""
    whole = sympy.Integer(0)
    for term in sympy.Add.make_args(rest):
        c, factor = term.as_coeff_Mul()
        if n.is_Integer and factor != 1 and 2 * c > n:
            whole += factor
    return whole, sympy.expand(rest - whole * n)


def _rejoined(e: IndexExpr) -> IndexExpr:
    """What a view split and another one joins again: n * (x // n) + x % n is x."""
    for remainder in e.atoms(PythonMod):
        x, n = remainder.args
        quotient, factor = FloorDiv(x, n), e.coeff(remainder)
        if factor != 0 and sympy.expand(e.coeff(quotient) - factor * n) == 0:
            e = sympy.expand(e + factor * (x - remainder - n * quotient))
    return e


def _next_group(shape: Shape, i: int, source: Shape, j: int) -> tuple[int, int]:
    """The shortest runs shape[i:i1] and source[j:j1] of the same number of elements; all that is left, if there are none."""
    ends = [(i1, j1) for i1 in range(i, len(shape) + 1) for j1 in range(j, len(source) + 1) if (i1, j1) != (i, j)]
    for i1, j1 in sorted(ends, key=sum):
        if sympy.expand(sympy.prod(shape[i:i1]) - sympy.prod(source[j:j1])) == 0:
            return i1, j1
    return len(shape), len(source)


def _multiple(term: IndexExpr, n: IndexExpr) -> tuple[IndexExpr, IndexExpr] | None:
    """n * x is n times x."""
    quotient = sympy.cancel(term / n) if not term.has(*_DIVISIONS) else None
    exact = quotient is not None and quotient.is_polynomial() and _integer_coefficients(quotient)
    return (quotient, sympy.Integer(0)) if exact else None


def _multiple_of_division(term: IndexExpr, n: IndexExpr) -> tuple[IndexExpr, IndexExpr] | None:
    """c * (x // m) is n times c / n * (x // m) where n divides c."""
    coefficient, rest = term.as_coeff_Mul()
    divides = term.has(*_DIVISIONS) and n.is_Integer and coefficient % n == 0
    return (coefficient / n * rest, sympy.Integer(0)) if divides else None


def _number(term: IndexExpr, n: IndexExpr) -> tuple[IndexExpr, IndexExpr] | None:
    """c is n times c // n, and c % n."""
    return (int(term) // int(n), int(term) % int(n)) if term.is_Integer and n.is_Integer else None


# How a term is divided by n: (whole, rest) with term == n * whole + rest
DIVISIONS = {"multiple": _multiple, "multiple of a division": _multiple_of_division, "number": _number}


def _integer_coefficients(e: IndexExpr) -> bool:
    return all(term.as_coeff_Mul()[0].is_Integer for term in sympy.Add.make_args(e))


def _sizes_nonnegative(e: IndexExpr, sizes: dict[sympy.Symbol, IndexExpr]) -> bool:
    """Is a polynomial of sizes alone nonnegative? They are at least one, and shifted by that it has only such coefficients;
    places are at least zero."""
    if e.is_Integer:
        return bool(e >= 0)
    free = e.free_symbols
    if any(s in sizes or not s.is_nonnegative for s in free) or not e.is_polynomial(*free):
        return False
    shifted = sympy.expand(e.subs({s: s + 1 for s in free if s.is_positive}, simultaneous=True))
    return all(term.as_coeff_Mul()[0] >= 0 for term in sympy.Add.make_args(shifted))


def linear(e: IndexExpr, x: sympy.Symbol) -> tuple[IndexExpr, IndexExpr] | None:
    """(slope, rest) with e == slope * x + rest and both free of x, or None."""
    e = sympy.expand(e)
    if not e.has(x):
        return sympy.Integer(0), e
    if any(d.has(x) for d in e.atoms(*_DIVISIONS)):
        return None
    slope = sympy.expand(e.diff(x))
    rest = sympy.expand(e - slope * x)
    return None if slope.has(x) or rest.has(x) else (slope, rest)
