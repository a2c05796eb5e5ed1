"""What integers can be that come of floats or are chosen: no value is outside, and buckets of distances have their bounds."""

from __future__ import annotations

import math
import random

import pytest

from fuse.ir.bounded import bounds_of
from fuse.ir.expr import FLOATS, Apply, Const, Expr, Load, apply, const, index, op, symbol, walk
from fuse.ir.grid import Grid
from fuse.ir.interval import WHOLE, anywhere, in_call

Q, K = index("q"), index("k")
DISTANCE = op("sub", op("add", K, symbol("k_start")), op("add", Q, symbol("q_start")))
FAR = op("abs", DISTANCE)


def cast(e: Expr, dtype: str) -> Expr:
    return apply("cast", e, dtype=dtype)


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    return apply("where", condition, a, b, dtype=a.dtype)


def both(operator: str, a: Expr, b: Expr) -> Expr:
    return apply(operator, a, b, dtype="bool")


def logarithmic(far: Expr, exact: int, buckets: int, dtype: str = "float32") -> Expr:
    """T5's: as many are exact, larger ones a logarithm's, up to a largest."""
    grown = op("mul", op("div", op("log", op("div", cast(far, dtype), exact)), math.log(128 / exact)), buckets - exact)
    large = op("minimum", op("add", cast(grown, "int64"), exact), buckets - 1)
    return where(op("lt", far, exact), far, large)


def signed(far: Expr, middle: int) -> Expr:
    """DeBERTa's: exact up to the middle, and further on a logarithm's, rounded up."""
    share = op("div", op("log", op("div", cast(far, "float32"), middle)), math.log((512 - 1) / middle))
    grown = op("add", op("ceil", op("mul", share, middle - 1)), middle)
    return cast(where(op("le", far, middle), cast(far, "float32"), grown), "int64")


PROVED: dict[str, tuple[Expr, int, int]] = {
    "both sides": (op("add", logarithmic(FAR, 8, 16), op("mul", cast(op("gt", DISTANCE, 0), "int64"), 16)), 0, 31),
    "behind": (logarithmic(op("neg", op("minimum", DISTANCE, 0)), 16, 32), 0, 31),
    "in halves": (logarithmic(FAR, 8, 16, "bfloat16"), 0, 15),
    "signed, cut": (op("minimum", op("maximum", op("add", op("mul", signed(FAR, 8), -1), 8), 0), 15), 0, 8),
    "smaller": (where(op("lt", FAR, 8), FAR, const(0)), 0, 7),
    "not larger": (where(apply("not", op("gt", FAR, 7), dtype="bool"), FAR, const(7)), 0, 7),
    "one and the other": (where(both("and", op("ge", FAR, 3), op("le", FAR, 4)), FAR, const(0)), 0, 4),
    "one or the other": (where(both("or", op("lt", FAR, 3), op("gt", FAR, 4)), const(3), FAR), 3, 4),
    "the same": (where(op("eq", DISTANCE, 5), DISTANCE, const(2)), 2, 5),
    "but one": (where(op("ne", DISTANCE, 5), const(2), DISTANCE), 2, 5),
    "a branch that is never taken": (where(op("lt", FAR, 0), DISTANCE, const(1)), 1, 1),
    "a logarithm of 1, or a little less than 0": (
        op("minimum", cast(op("floor", op("log", cast(op("maximum", FAR, 1), "float32"))), "int64"), 3), -1, 3,
    ),
    "a root": (cast(op("sqrt", op("minimum", cast(FAR, "float32"), 80.0)), "int64"), 0, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_buckets_of_distances_have_their_bounds(name: str) -> None:
    e, low, high = PROVED[name]
    found = bounds_of(e, anywhere)
    assert (found.low, found.high) == (low, high)


FURTHER = op("mul", cast(FAR, "float32"), 1.5)
UNPROVED = {
    "a logarithm of zero": cast(op("log", cast(FAR, "float32")), "int64"),
    "its other branch": where(
        op("ge", FAR, 8), const(0), op("minimum", cast(op("log", cast(DISTANCE, "float32")), "int64"), 15)
    ),
    "larger than integers": cast(op("exp", cast(FAR, "float32")), "int64"),
    "what data say": cast(Load("float32", 0, (Q,)), "int64"),
    "a float that is compared": where(op("lt", FURTHER, 8.0), cast(FURTHER, "int64"), const(0)),
}


@pytest.mark.parametrize("name", UNPROVED)
def test_what_is_not_known_has_no_bounds(name: str) -> None:
    found = bounds_of(UNPROVED[name], anywhere)
    assert not (found.low >= 0 and found.high < 2**24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_no_value_is_outside(dtype: str) -> None:
    """Of random integers that are made of floats and choices, as eager rounds them and as exact arithmetic has them."""
    draw, some = random.Random(0), 0
    symbols = {"q_len": 12, "kv_len": 12, "q_start": 5, "k_start": 0}
    grid = Grid.over({"q": (0, 12), "k": (0, 12)}, symbols)
    for _ in range(400):
        e = integer(draw, 3, dtype)
        found = bounds_of(e, in_call(symbols))
        for form in (e, widened(e)):
            values = grid.evaluate(form)
            assert found.low <= int(values.min()) and int(values.max()) <= found.high, (str(e), found)
        some += found != WHOLE["int64"]
    assert some > 200


def integer(draw: random.Random, depth: int, dtype: str) -> Expr:
    if depth == 0:
        return draw.choice([Q, K, DISTANCE, FAR, const(draw.randint(-9, 9))])
    x, y = (integer(draw, depth - 1, dtype) for _ in range(2))
    made = draw.choice(("add", "sub", "minimum", "maximum", "abs", "where", "where", "where", "float", "float", "float"))
    if made == "where":
        return where(condition(draw, x, y), *draw.sample([x, y, integer(draw, depth - 1, dtype)], 2))
    if made == "float":
        return cast(real(draw, x, depth, dtype), "int64")
    return op(made, x) if made == "abs" else op(made, x, y)


def condition(draw: random.Random, x: Expr, y: Expr) -> Expr:
    a, b = (op(draw.choice(("lt", "le", "gt", "ge", "eq", "ne")), x, draw.choice((y, const(3)))) for _ in range(2))
    return draw.choice((a, apply("not", a, dtype="bool"), apply(draw.choice(("and", "or")), a, b, dtype="bool")))


def real(draw: random.Random, x: Expr, depth: int, dtype: str) -> Expr:
    e = cast(x, dtype)
    for _ in range(depth):
        made = draw.choice(("add", "mul", "div", "log", "exp", "sqrt", "tanh", "log1p", "floor", "round", "neg", "minimum"))
        number = draw.choice((0.3, 8.0, -2.5, 7.0))
        e = op(made, e, number) if made in ("add", "mul", "div", "minimum") else op(made, e)
    return op("maximum", op("minimum", e, 1e6), -1e6)


def widened(e: Expr) -> Expr:
    """The same without roundings."""
    new: dict[Expr, Expr] = {}
    for n in walk(e):
        dtype = "float64" if n.dtype in FLOATS else n.dtype
        if isinstance(n, Const):
            new[n] = const(n.value, dtype)
        elif isinstance(n, Apply):
            new[n] = apply(n.op, *(new[a] for a in n.operands), dtype=dtype)
        else:
            new[n] = n
    return new[e]
