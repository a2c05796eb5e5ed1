"""Index algebra: each rule on symbols, and against the numbers that it stands for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proving import whole
from torch.utils._sympy.functions import FloorDiv, PythonMod

from fuse.ir import index
from fuse.ir.index import Space, linear, size_symbol

S, B = size_symbol("S"), size_symbol("B")


def space() -> tuple[Space, dict[str, sympy.Symbol]]:
    s = Space()
    return s, {"b": s.add("b", B), "h": s.add("h", 12), "q": s.add("q", S), "d": s.add("d", 64)}


@pytest.mark.parametrize(
    ("coords", "shape", "source", "expected"),
    [
        ("12*b + h, q, d", (12 * B, S, 64), (B, 12, S, 64), "b, h, q, d"),
        ("b, h, q, d", (B, 12, S, 64), (B * 12, S, 64), "12*b + h, q, d"),
        ("b, q, 64*h + d", (B, S, 768), (B, S, 12, 64), "b, q, h, d"),
        ("b, q, h, d", (B, S, 12, 64), (B * S, 768), "S*b + q, 64*h + d"),
        ("S*b + q, 64*h + d", (B * S, 768), (B, S, 12, 64), "b, q, h, d"),
        ("0, h, q, d", (1, 12, S, 64), (12, S, 64), "h, q, d"),
        ("b, h", (B, 12), (B, 1, 1, 12), "b, 0, 0, h"),
    ],
)
def test_reshape_keeps_the_dimensions_that_it_does_not_touch(
    coords: str, shape: tuple[object, ...], source: tuple[object, ...], expected: str
) -> None:
    s, axes = space()
    names = axes | {"S": S, "B": B}
    read = lambda text: tuple(sympy.sympify(f"({text},)", locals=names))  # noqa: E731
    found = s.reshape(read(coords), [sympy.sympify(n) for n in shape], [sympy.sympify(n) for n in source])
    assert tuple(sympy.expand(x) for x in found) == tuple(sympy.expand(x) for x in read(expected))


@pytest.mark.parametrize("n", [2, 9, 77])
def test_a_relative_shift_is_the_distance(n: int) -> None:
    """Position (q, k) of n x n lies at row q, column k - q + n of n x 2n: a view of what is a column shorter."""
    s = Space()
    q, k = s.add("q", sympy.Integer(n)), s.add("k", sympy.Integer(n))
    flat = sympy.expand((2 * n - 1) * q + k + n)
    assert (s.floordiv(flat, sympy.Integer(2 * n)), s.mod(flat, sympy.Integer(2 * n))) == (q, sympy.expand(k - q + n))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.integers(-30, 30), st.integers(-30, 30), st.integers(-30, 30), st.integers(1, 30), st.integers(1, 6), st.integers(1, 6)
)
def test_divisions_are_those_of_the_numbers(a: int, b: int, c: int, n: int, rows: int, columns: int) -> None:
    s = Space()
    q, k = s.add("q", sympy.Integer(rows)), s.add("k", sympy.Integer(columns))
    whole, rest = (f(a * q + b * k + c, sympy.Integer(n)) for f in (s.floordiv, s.mod))
    for i, j in itertools.product(range(rows), range(columns)):
        at = {q: i, k: j}
        assert (whole.subs(at), rest.subs(at)) == divmod(a * i + b * j + c, n)


def test_grouped_heads_become_a_division() -> None:
    s, a = space()
    assert str(s.reshape((a["h"],), [sympy.Integer(12)], [sympy.Integer(4), sympy.Integer(3)])[0]) == "(h//3)"


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_reshape_reads_the_element_that_torch_reads(source: list[int], random: object) -> None:
    total = math.prod(source)
    shape = _random_factors(total, random)
    x = torch.arange(total).reshape(source)
    y = x.reshape(shape)
    s = Space()
    axes = [s.add(f"x{i}", n) for i, n in enumerate(shape)]
    found = s.reshape(axes, [sympy.Integer(n) for n in shape], [sympy.Integer(n) for n in source])
    for at in itertools.product(*map(range, shape)):
        values = dict(zip(axes, at, strict=True))
        assert x[tuple(int(c.subs(values)) for c in found)] == y[at]


def _random_factors(total: int, random: object) -> list[int]:
    factors = []
    while total > 1:
        f = random.choice([n for n in range(2, total + 1) if total % n == 0])  # type: ignore[attr-defined]
        factors.append(f)
        total //= f
    return factors or [1]


@pytest.mark.parametrize(
    ("text", "proved"),
    [("S - 1 - q", True), ("q", True), ("q - 1", False), ("S*b + q", True), ("11 - h", True), ("10 - h", False),
     ("B*S - 1 - S*b - q", True), ("S - 2 - q", False), ("S - B", False), ("FloorDiv(q, 16)", True),
     ("S - 1 - FloorDiv(q, 16)", True), ("FloorDiv(q, 16) - 1", False), ("FloorDiv(q - 1, 16)", False),
     ("FloorDiv(S - 1, 16) - FloorDiv(q, 16)", False)],
)  # fmt: skip
def test_nonnegative_is_answered_for_all_sizes(text: str, proved: bool) -> None:
    s, axes = space()
    assert s.nonnegative(sympy.sympify(text, locals=axes | {"S": S, "B": B, "FloorDiv": FloorDiv})) is proved


def test_linear_finds_the_stride_or_declines() -> None:
    s, a = space()
    assert linear(64 * a["h"] + a["d"] + 3, a["h"]) == (64, a["d"] + 3)
    assert linear(s.floordiv(a["h"], sympy.Integer(3)), a["h"]) is None
    assert linear(a["h"] * a["h"], a["h"]) is None


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-6, 6), st.sampled_from("qbsc1")), min_size=1, max_size=4),
    st.integers(1, 6), st.sampled_from([FloorDiv, PythonMod, None]), st.integers(1, 5),
)  # fmt: skip
def test_index_algebra_is_integer_arithmetic(terms: list[tuple[int, str]], n: int, inner: Any, m: int) -> None:
    """floordiv, mod, nonnegative and upper, on all values of the indices and sizes of a small grid."""
    space = Space()
    size = size_symbol("s")
    q, b = space.add("q", size), space.add("b", 4)
    names: dict[str, Any] = {"q": q, "b": b, "s": size, "c": q * size, "1": sympy.Integer(1)}
    e = sum((c * names[t] for c, t in terms), sympy.Integer(0))
    e = e if inner is None else e + 2 * inner(q + b, m)
    quotient, remainder = space.floordiv(e, sympy.Integer(n)), space.mod(e, sympy.Integer(n))
    positive, upper = space.nonnegative(e), space.upper(e)
    rejoined = index._rejoined(sympy.expand(n * quotient + remainder))
    for s, at_b in itertools.product((1, 2, 5), range(4)):
        for at_q in range(s):
            values = {q: at_q, b: at_b, size: s}
            expected = whole(e, values)
            assert whole(quotient, values) == expected // n and whole(remainder, values) == expected % n
            assert not positive or expected >= 0
            assert upper is None or expected <= whole(upper, values)
            assert whole(rejoined, values) == expected


def test_a_division_of_a_range_ends_where_its_last_element_is() -> None:
    s = Space()
    q = s.add("q", 9)
    assert s.nonnegative(2 - FloorDiv(q, 4)) and not s.nonnegative(1 - FloorDiv(q, 4))
