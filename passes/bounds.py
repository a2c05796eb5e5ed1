"""Closed-form bounds of a predicate: lower(q) <= k < upper(q), and what is left to be checked per entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set
from dataclasses import dataclass

import sympy

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Load, apply, const
from fuse.ir.index import IndexExpr, Space, linear, variable
from fuse.ir.spec import AttentionSpec
from fuse.passes.read.elements import Reader, spec_reader
from fuse.torch_private import FloorDiv

_SWAPPED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}
_NEGATED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}
_OPPOSITE = {"and": "or", "or": "and"}
_Q, _K = variable("q"), variable("k")
# Integers from the user are held within these bounds before anything is added to them, lest the sum wrap.
FAR = 2**40


@dataclass(frozen=True)
class Bounds:
    """A predicate as lower <= k < upper and residual, where None is no condition; neither bound decreases with q."""

    lower: Expr | None = None
    upper: Expr | None = None
    residual: Expr | None = None


def bounds(spec: AttentionSpec, predicate: Expr, rising: Set[int] = frozenset()) -> Bounds:
    """The bounds of ``predicate`` over the indices of ``spec``; what has no closed form stays in the residual.

    rising  operands of one dimension whose elements never decrease along it
    """
    return _bounded(spec_reader(spec, rising), pushed(predicate))


# ------------------------------------------------------------------------------------- logic, down to comparisons


def _negated_connective(e: Apply) -> Expr | None:
    """not (a and b) is not a or not b; not (a or b) is not a and not b."""
    inner = e.operands[0]
    if not (e.op == "not" and isinstance(inner, Apply) and inner.op in _OPPOSITE):
        return None
    return apply(_OPPOSITE[inner.op], *(apply("not", x, dtype="bool") for x in inner.operands), dtype="bool")


def _negated_comparison(e: Apply) -> Expr | None:
    """not a < b is a >= b for integers; floats have NaN."""
    inner = e.operands[0]
    if not (e.op == "not" and isinstance(inner, Apply) and inner.op in _NEGATED and inner.operands[0].dtype not in expr.FLOATS):
        return None
    return apply(_NEGATED[inner.op], *inner.operands, dtype="bool")


def _both_ways(e: Apply) -> tuple[tuple[str, Expr, Expr], tuple[str, Expr, Expr]]:
    a, b = e.operands
    return (e.op, a, b), (_SWAPPED[e.op], b, a)


def _absolute(e: Apply) -> Expr | None:
    """abs(x) < n is x < n and -x < n; abs(x) > n is x > n or -x > n."""
    if e.op not in _SWAPPED or e.operands[0].dtype not in expr.INTS:
        return None
    for op, this, other in _both_ways(e):
        if isinstance(this, Apply) and this.op == "abs":
            sides = (this.operands[0], apply("neg", this.operands[0], dtype=this.dtype))
            joined = "and" if op in ("lt", "le") else "or"
            return apply(joined, *(apply(op, x, other, dtype="bool") for x in sides), dtype="bool")
    return None


def _extremum(e: Apply) -> Expr | None:
    """max(a, b) <= c is a <= c and b <= c; min(a, b) <= c is a <= c or b <= c; likewise for the other comparisons."""
    if e.op not in _SWAPPED or e.operands[0].dtype not in expr.INTS:
        return None
    for op, this, other in _both_ways(e):
        if isinstance(this, Apply) and this.op in ("minimum", "maximum"):
            every = (this.op == "maximum") == (op in ("lt", "le"))
            parts = (apply(op, x, other, dtype="bool") for x in this.operands)
            return apply("and" if every else "or", *parts, dtype="bool")
    return None


Logic = dict[str, Callable[[Apply], Expr | None]]
NEGATIONS: Logic = {"negated connective": _negated_connective, "negated comparison": _negated_comparison}
DISTANCES: Logic = {"absolute value": _absolute, "maximum and minimum": _extremum}


def pushed(e: Expr) -> Expr:
    """A truth value as conjunctions and disjunctions of comparisons and loads."""
    if not (isinstance(e, Apply) and e.dtype == "bool"):
        return e
    if (found := _by(NEGATIONS, e)) is not None:
        return pushed(found)
    return apply(e.op, *map(pushed, e.operands), dtype="bool") if e.op in _OPPOSITE else e


def _by(rules: Logic, e: Expr) -> Expr | None:
    """What the first rule that fits makes of ``e``."""
    found = (rule(e) for rule in rules.values()) if isinstance(e, Apply) else ()
    return next((x for x in found if x is not None), None)


# ------------------------------------------------------------------------------------------------ parts into one


def _bounded(r: Reader, e: Expr) -> Bounds:
    if isinstance(e, Const) and e.value:
        return Bounds()
    if isinstance(e, Apply) and e.op in _OPPOSITE:
        parts = [_bounded(r, x) for x in _parts(e, e.op)]
        return conjunction(parts) if e.op == "and" else disjunction(parts, e)
    if (sides := _by(DISTANCES, e)) is not None:
        found = _bounded(r, sides)
        return dataclasses.replace(found, residual=found.residual and e)
    return _closed(r, e) or Bounds(residual=e)


def _parts(e: Expr, op: str) -> list[Expr]:
    if isinstance(e, Apply) and e.op == op:
        return list(dict.fromkeys(part for x in e.operands for part in _parts(x, op)))
    return [e]


def conjunction(parts: list[Bounds]) -> Bounds:
    lower = _joined("maximum", [p.lower for p in parts if p.lower is not None])
    upper = _joined("minimum", [p.upper for p in parts if p.upper is not None])
    return Bounds(lower, upper, _joined("and", [p.residual for p in parts if p.residual is not None]))


def disjunction(parts: list[Bounds], whole: Expr) -> Bounds:
    """``whole`` lies between the lowest lower and the highest upper; it is no more than that where all have one same side."""
    lowers, uppers = [p.lower for p in parts if p.lower is not None], [p.upper for p in parts if p.upper is not None]
    one_sided = not (lowers and uppers) and len(lowers or uppers) == len(parts)
    exact = one_sided and all(p.residual is None for p in parts)
    return Bounds(
        _joined("minimum", lowers) if len(lowers) == len(parts) else None,
        _joined("maximum", uppers) if len(uppers) == len(parts) else None,
        None if exact else whole,
    )


def _joined(op: str, terms: list[Expr]) -> Expr | None:
    out: Expr | None = None
    for term in dict.fromkeys(terms):
        out = term if out is None else apply(op, out, term, dtype=term.dtype)
    return out


# -------------------------------------------------------------------------------------------------- one comparison


def _closed(r: Reader, clause: Expr) -> Bounds | None:
    """The bounds that an integer comparison is, or None if it is no bounds that never decrease with q."""
    if not (isinstance(clause, Apply) and clause.op in (*_SWAPPED, "eq") and clause.operands[0].dtype in expr.INTS):
        return None
    a, b = (r.index(x) for x in clause.operands)
    differences = {"le": [b - a], "lt": [b - a - 1], "ge": [a - b], "gt": [a - b - 1], "eq": [a - b, b - a]}[clause.op]
    sides = [_solved(r, sympy.expand(d)) for d in differences]
    found = [s for s in sides if s is not None]
    return conjunction(found) if len(found) == len(sides) else _same_block(r, clause)


def _solved(r: Reader, difference: IndexExpr) -> Bounds | None:
    """The solution for k of difference >= 0, where it is a bound that never decreases with q."""
    found = next((x for solve in SOLUTIONS.values() if (x := solve(r.space, difference)) is not None), None)
    limit = None if found is None else _held(r, sympy.expand(found[1]))
    if found is None or limit is None or not _never_decreases(r, limit):
        return None
    return Bounds(lower=r.expression(limit)) if found[0] else Bounds(upper=r.expression(limit))


def linear_in_key(space: Space, difference: IndexExpr) -> tuple[bool, IndexExpr] | None:
    """n * k + x >= 0 is k >= ceil(-x / n), and -n * k + x >= 0 is k < floor(x / n) + 1: (is it a lower bound?, the bound)."""
    return None if any(d.has(_K) for d in difference.atoms(FloorDiv)) else _linear(space, difference, _K)


def linear_in_block(space: Space, difference: IndexExpr) -> tuple[bool, IndexExpr] | None:
    """The same for (k + r) // m in the place of k: it is at least a bound where k >= m * bound - r, below it where k < that."""
    blocks = [d for d in difference.atoms(FloorDiv) if d.has(_K)]
    parts = linear(blocks[0].args[0], _K) if len(blocks) == 1 else None
    if parts is None or parts[0] != 1 or not blocks[0].args[1].is_positive:
        return None
    block = sympy.Dummy("block", integer=True)
    found = _linear(space, difference.subs(blocks[0], block), block)
    return found and (found[0], blocks[0].args[1] * found[1] - parts[1])


def _linear(space: Space, difference: IndexExpr, x: sympy.Symbol) -> tuple[bool, IndexExpr] | None:
    parts = linear(difference, x)
    if parts is None or not parts[0].is_Integer or parts[0] == 0 or parts[1].has(_K):
        return None
    slope, rest = parts
    return (True, -space.floordiv(rest, slope)) if slope > 0 else (False, space.floordiv(rest, -slope) + 1)


SOLUTIONS = {"linear in the key": linear_in_key, "linear in a block of keys": linear_in_block}


def _same_block(r: Reader, clause: Apply) -> Bounds | None:
    """k // n == x // n, for an n that is known when the kernel runs only: k lies in the block of n that x lies in."""
    a, b = clause.operands
    for block, other in ((a, b), (b, a)) if clause.op == "eq" else ():
        if not all(isinstance(x, Apply) and x.op == "floordiv" and x.dtype == "int64" for x in (block, other)):
            return None
        (k, n), (x, m) = block.args, other.args
        if k is expr.index("k") and n is m and not expr.axes(n) & {"q", "k"} and "k" not in expr.axes(x):
            return same_block(x, n) if _never_decreases(r, r.index(x)) else None
    return None


def same_block(x: Expr, n: Expr) -> Bounds:
    """The block begins at n * (x // n) where n > 0 and ends there where n < 0."""
    begin = apply("mul", apply("floordiv", x, n, dtype="int64"), n, dtype="int64")
    end = apply("add", begin, n, dtype="int64")
    after = (apply("add", y, const(1), dtype="int64") for y in (begin, end))
    upper = apply("maximum", end, next(after), dtype="int64")
    return Bounds(apply("minimum", begin, next(after), dtype="int64"), upper)


def _held(r: Reader, limit: IndexExpr) -> IndexExpr | None:
    """``limit`` such that it cannot wrap: an integer from a tensor or from the user may be as large as int64 allows."""
    if any(abs(c) > FAR for c in limit.atoms(sympy.Integer)):
        return None
    data = sorted((s for s in limit.free_symbols if s not in r.space.sizes and not s.is_nonnegative), key=str)
    if not data or limit == data[0]:
        return limit
    parts = linear(limit, data[0])
    if len(data) > 1 or parts is None or abs(parts[0]) != 1:
        return None
    held = apply("maximum", apply("minimum", r.expression(data[0]), const(FAR), dtype="int64"), const(-FAR), dtype="int64")
    return limit.subs(data[0], r.atom(held))


def _never_decreases(r: Reader, e: IndexExpr) -> bool:
    """Sums of nonnegative multiples of q, of floor divisions of such sums, and of what is read at q from a rising tensor."""
    for term in sympy.Add.make_args(sympy.expand(e)):
        coefficient, rest = term.as_coeff_Mul()
        if not term.has(_Q):
            if expr.axes(r.expression(term)) & {"q", "k"} and not (coefficient > 0 and _rises(r, r.expression(rest))):
                return False
        elif isinstance(rest, FloorDiv):
            if coefficient < 0 or rest.args[1].has(_Q) or not _never_decreases(r, rest.args[0]):
                return False
        elif (parts := linear(term, _Q)) is None or not r.space.nonnegative(parts[0]):
            return False
    return True


def _rises(r: Reader, e: Expr) -> bool:
    while isinstance(e, Apply) and e.op == "cast" and e.dtype == "int64":
        (e,) = e.operands
    return isinstance(e, Load) and e.operand in r.rising and e.coords == (expr.index("q"),)
