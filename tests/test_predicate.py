"""Masks of any kind are separated from a score, and what is said of the two parts holds on every value of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cast, op
from proving import (
    FLOAT_DTYPES,
    P,
    Q,
    evaluated,
    repeatable,
)

from fuse.ir import expr
from fuse.ir.expr import Const, Expr, Load, Score, const
from fuse.passes import intervals, predicate

DATA = (0.0, 1.0, 0.5, -3.0, -2.1e4, -65504.0, -2.1e28, -3.3e38, -math.inf)


def _lowest(dtype: str) -> Const:
    return const(torch.finfo(getattr(torch, dtype)).min, dtype)


def masks(dtype: str) -> st.SearchStrategy[Callable[[Expr], Expr]]:
    """Ways to mask a score by P, Q, or by a tensor, hard and soft ones, in any dtype."""
    truth = st.sampled_from([P, op("not", P), op("and", P, Q), op("or", P, op("not", Q)), op("ne", Load(dtype, 3, ()), 0.5)])
    as_float = truth.map(lambda p: cast(p, dtype))
    fill = st.sampled_from([-math.inf, -1e9, -1e4, -2.0, 3e4, _lowest(dtype).value, _lowest("bfloat16").value]).map(
        lambda x: const(x, dtype)
    )
    data = st.just(Load(dtype, 4, ()))
    one = const(1.0, dtype)

    def inverse(p: Expr) -> Expr:
        return op("sub", one, p)

    return st.one_of(
        st.builds(lambda p, x: lambda s: op("where", p, s, x), truth, fill),
        st.builds(lambda p, x: lambda s: op("add", s, op("where", p, const(0.0, dtype), x)), truth, fill),
        st.builds(lambda p, x: lambda s: op("add", op("mul", inverse(p), x), s), as_float, fill),
        st.builds(lambda p, x: lambda s: op("add", op("mul", s, p), op("mul", inverse(p), x)), as_float, fill),
        st.builds(lambda x: lambda s: op("maximum", s, x), fill),
        st.builds(lambda p, x: lambda s: op("minimum", s, op("where", p, const(math.inf, dtype), x)), truth, fill),
        st.builds(lambda x: lambda s: op("add", s, x), data),
        st.builds(lambda x, f: lambda s: op("add", s, op("mul", inverse(x), f)), data, fill),
        st.builds(lambda x, f: lambda s: op("sub", op("mul", s, x), op("mul", inverse(x), op("neg", f))), data, fill),
        st.just(lambda s: op("mul", s, 0.125)),
        st.just(lambda s: op("neg", op("neg", s))),
        st.just(lambda s: op("mul", op("tanh", op("div", s, 5.0)), 5.0)),
    )


SCORES = (0.0, -0.0, 1.5, -37.0, 900.0)


@settings(repeatable, max_examples=400)
@given(st.sampled_from(FLOAT_DTYPES).flatmap(lambda d: st.tuples(st.just(d), st.lists(masks(d), min_size=1, max_size=4))))
def test_a_separated_score_is_what_it_was_on_every_value(case: tuple[str, list[Callable[[Expr], Expr]]]) -> None:
    """Where the predicate holds, ``visible`` is the score; where it does not, the score is at most ``fill``."""
    dtype, steps = case
    score: Expr = Score(dtype)
    for step in steps:
        score = step(score)
    split = predicate.separate(score, 1)
    if split is None:
        return
    leaves: dict[Expr, list[Any]] = {P: [True, False], Q: [True, False], Score(dtype): list(SCORES)}
    leaves |= {Load(dtype, i, ()): list(DATA) for i in (3, 4)}
    values = {
        n: torch.tensor(v, dtype=torch.float64)
        .to(getattr(torch, n.dtype))
        .reshape([-1 if i == d else 1 for d in range(len(leaves))])
        for i, (n, v) in enumerate(leaves.items())
    }
    shape = [len(v) for v in leaves.values()]
    visible, expected, got = (evaluated(e, values).expand(shape) for e in (split.predicate, score, split.visible))
    assert torch.equal(torch.nan_to_num(expected[visible], 1.25), torch.nan_to_num(got[visible], 1.25))
    ordinary = torch.ones(shape, dtype=torch.bool)
    for term in predicate._without_score(score):
        value = evaluated(term, values)
        ordinary = (
            ordinary & (value <= intervals.largest(dtype))
            if any(isinstance(n, Load) and n.dtype != "bool" for n in expr.walk(term))
            else ordinary
        )
    hidden = expected[~visible & ordinary]
    assert bool((hidden <= split.fill).all()), (str(score), str(split.predicate), hidden.max(), split.fill)
