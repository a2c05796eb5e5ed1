"""Gradients that are said to lie apart do, by the place of every element, whatever the sizes are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import B0, B1, D, Q, op, problem
from proving import repeatable

from fuse.ir.expr import Expr, Load, symbol
from fuse.ir.grid import Grid
from fuse.kernel.destinations import Destination, overlapping

Place = tuple[Expr, ...]
N = symbol("n")
HALF = op("floordiv", B0, 2)


def total(*terms: tuple[Expr, int | Expr]) -> Expr:
    found = [op("mul", of, step) for of, step in terms]
    return found[0] if len(found) == 1 else op("add", found[0], total(*terms[1:]))


def said_apart(place: Place, sizes: dict[str, int] | None, features: int) -> bool:
    to = Destination("query", Load("float32", 0, place), "matrix", tuple(range(len(place))))
    return not overlapping([to], problem("float32", qk_dim=features).spec, sizes)


def are_apart(place: Place, sizes: dict[str, int], features: int) -> bool:
    """Each batch index writes to as many elements as it has, and two to the same ones or to none in common."""
    extents = {"b0": (0, sizes["B0"]), "b1": (0, sizes["B1"]), "q": (0, sizes["q_len"]), "d": (0, features)}
    shape = [n for _, n in extents.values()]
    at = [Grid.over(extents, sizes).evaluate(c).expand(shape).flatten(0, 1).flatten(1).tolist() for c in place]
    written = [list(zip(*rows, strict=True)) for rows in zip(*at, strict=True)]
    distinct = all(len(set(places)) == len(places) for places in written)
    return distinct and all(a == b or not set(a) & set(b) for a, b in itertools.combinations(written, 2))


def shown(x: object) -> str:
    return ", ".join(map(str, x)) if isinstance(x, tuple) else str(x)


@st.composite
def places(draw: st.DrawFn) -> Place:
    of = st.sampled_from((B0, B1, HALF, Q, D, op("floordiv", Q, 2), op("mul", B0, Q)))
    step = st.one_of(st.integers(1, 12), st.sampled_from((1, 2, 3, 4, 6, 8, 12, 24)), st.just(N))
    terms = st.lists(st.tuples(of, step), min_size=1, max_size=4)
    return tuple(total(*draw(terms)) for _ in range(draw(st.integers(1, 2))))


@settings(repeatable, max_examples=500)
@given(places(), st.tuples(*(st.integers(1, 4) for _ in range(4))), st.integers(1, 4))
def test_what_is_said_to_lie_apart_does(place: Place, lengths: tuple[int, ...], features: int) -> None:
    sizes = dict(zip(("B0", "B1", "q_len", "n"), lengths, strict=True)) | {"kv_len": 3}
    assert not said_apart(place, sizes, features) or are_apart(place, sizes, features)


@pytest.mark.parametrize(
    "place, n",
    [
        ((total((D, 1), (Q, 3)),), 1),
        ((total((D, 4), (Q, 1)),), 1),
        ((total((D, N), (Q, 1)),), 5),
        ((total((B0, 1), (Q, 4)), D), 1),
        ((total((D, 1), (B0, 3), (Q, 12)),), 1),
        ((total((D, 1), (B1, 3), (B0, 9), (Q, 36)),), 1),
        ((total((Q, 1), (HALF, N)), D), 4),
        ((total((D, 1), (B0, 6), (B1, 9)), Q), 1),
        ((Q, Q, D), 1),
    ],
    ids=shown,
)
def test_digits_lie_apart(place: Place, n: int) -> None:
    """So do batch indices that share all: 6 b0 + 9 b1 is 18 for (3, 0) and (0, 2)."""
    sizes = {"B0": 4, "B1": 3, "q_len": 4, "kv_len": 3, "n": n}
    assert are_apart(place, sizes, 3) and said_apart(place, sizes, 3) and said_apart(place, None, 3)


@pytest.mark.parametrize(
    "place",
    [
        (total((D, 1), (Q, 2)),),
        (total((D, 1), (B0, 2)), Q),
        (total((D, 1), (Q, 3), (B0, 10)),),
        (total((D, N), (Q, 1)),),
        (total((B0, 1), (Q, 1)), D),
        (D,),
    ],
    ids=shown,
)
def test_places_that_are_met_twice_do_not(place: Place) -> None:
    sizes = {"B0": 2, "B1": 3, "q_len": 4, "kv_len": 3, "n": 3}
    assert not are_apart(place, sizes, 3) and not said_apart(place, sizes, 3)
