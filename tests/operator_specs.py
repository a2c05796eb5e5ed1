"""Problems with every operator of the expression language, for every target: once per head, per query, per key or per entry.

problem = of_operators("ints", "query", "float32")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

from problems import B0, B1, K, Problem, Q, both, cast, load, op, problem, rand

from fuse.ir import expr
from fuse.ir.expr import Expr

LEVELS = {"head": (B0, B1), "query": (B0, B1, Q), "key": (B0, B1, K), "entry": (B0, B1, Q, K)}
SIZES = {B0: 2, B1: 3, Q: 37, K: 37}


def _floats(x: Expr) -> list[Expr]:
    positive = op("add", op("abs", x), 0.1)
    unary = [
        op(name, x) for name in ("neg", "exp", "exp2", "expm1", "tanh", "sigmoid", "erf", "sin", "cos", "sign", "reciprocal")
    ]
    unary += [op(name, positive) for name in ("log", "log2", "log1p", "sqrt", "rsqrt", "abs")]
    rounded = [op(name, op("mul", x, 3.0)) for name in ("floor", "ceil", "trunc", "round")]
    binary = [op(name, x, positive) for name in ("sub", "div", "minimum", "maximum", "mod", "floordiv")]
    return [*unary, *rounded, *binary, op("pow", positive, 1.5)]


def _ints(n: Expr) -> list[Expr]:
    return [
        op("floordiv", n, 7), op("floordiv", n, 8), op("mod", n, 7), op("mod", n, 8), op("floordiv", n, -3), op("mod", n, -3),
        op("mul", n, n), op("neg", n), op("abs", n), op("sign", n), op("minimum", n, 3), op("maximum", n, 3), op("and", n, 5),
        op("or", n, 5), op("xor", n, 5), op("not", n), cast(cast(n, "int8"), "int64"), cast(cast(n, "uint8"), "int64"),
    ]  # fmt: skip


def _bools(x: Expr, n: Expr) -> list[Expr]:
    compared = [op(name, n, 2) for name in ("eq", "ne", "lt", "le", "gt", "ge")]
    odd = expr.apply("isnan", op("div", op("sub", x, x), op("sub", x, x)), dtype="bool")
    infinite = expr.apply("isinf", op("div", op("add", op("abs", x), 1.0), op("sub", x, x)), dtype="bool")
    return [
        *compared,
        both(*compared[1:3]),
        op("or", *compared[:2]),
        op("xor", *compared[2:4]),
        op("not", compared[0]),
        odd,
        infinite,
    ]


def _extremes(x: Expr, n: Expr) -> list[Expr]:
    """At infinities too; a result that is one, or NaN, is a number of its own. No finite one is beyond float32."""
    far = op("where", op("gt", n, 5), math.inf, op("where", op("lt", n, -5), -math.inf, op("mul", op("tanh", x), 80.0)))
    size = op("abs", far)
    found = [op(name, far) for name in ("neg", "exp", "exp2", "expm1", "tanh", "sigmoid", "erf", "sign", "reciprocal")]
    found += [op(name, size) for name in ("log", "log2", "log1p", "sqrt", "rsqrt", "abs")]
    found += [op(name, far, 0.5) for name in ("minimum", "maximum", "add", "div")] + [op("sub", far, far)]
    nan, infinite = ([expr.apply(name, y, dtype="bool") for y in found] for name in ("isnan", "isinf"))
    told = [op("where", odd, 2.0, op("sign", y)) for odd, y in zip(infinite, found, strict=True)]
    finite = [op("where", op("or", a, b), 0.0, y) for a, b, y in zip(nan, infinite, found, strict=True)]
    return [*finite, *(op("where", odd, 3.0, y) for odd, y in zip(nan, told, strict=True))]


def _sum(terms: list[Expr]) -> Expr:
    return reduce(lambda a, b: op("add", a, b), terms)


def of_operators(kind: str, level: str, dtype: str = "float32") -> Problem:
    """The sum of what ``kind`` makes of x and n, each in [-1, 1], added to the score: x is a loaded float, n an integer of
    either sign."""
    coords, make = LEVELS[level], KINDS[kind]
    x, n = rand(*(SIZES[c] for c in coords), dtype=dtype), (rand(*(SIZES[c] for c in coords), seed=5) * 9).round().long()
    found = [cast(term, dtype) for term in make(load(x, 3, *coords), load(n, 4, *coords))]
    bounded = [op("div", term, op("add", op("abs", term), 1.0)) for term in found]
    return problem(dtype, x, n, score=lambda s: op("add", s, op("mul", _sum(bounded), 0.1)))


KINDS: dict[str, Callable[[Expr, Expr], list[Expr]]] = {
    "floats": lambda x, n: _floats(x),
    "extremes": _extremes,
    "ints": lambda x, n: _ints(n),
    "narrow_ints": lambda x, n: _ints(op("sub", op("mul", cast(cast(n, "int32"), "int64"), 1), 1)),
    "bools": _bools,
    "choices": lambda x, n: [op("where", op("gt", n, 0), x, op("neg", x)), cast(op("where", op("gt", x, 0.0), n, 3), x.dtype)],
}
