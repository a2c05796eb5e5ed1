"""Lower, upper and residual of random predicates are the predicate, on whole grids."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import K, Q, op, problem
from proving import (
    repeatable,
)

from fuse.ir import expr
from fuse.ir.expr import Expr, Load, const, symbol
from fuse.ir.spec import Mask, verify
from fuse.passes import bounds
from fuse.targets import reference

RISING = 6  # the operand whose elements never decrease


def leaves() -> st.SearchStrategy[Expr]:
    q, k = expr.index("q"), expr.index("k")
    n, size, per_row = st.integers(-4, 6), st.integers(1, 4), Load("int64", 5, (q,))
    anything, data = (Load("int64", i, (expr.index("b0"),)) for i in (3, 4))
    rising = Load("int64", RISING, (q,))
    block = st.builds(
        lambda c, m: (op("floordiv", op("add", q, c), m), op("floordiv", op("add", k, c), m)), st.integers(0, 2), size
    )
    extra = symbol("extra")
    comparison = st.sampled_from(expr.COMPARISONS)
    return st.one_of(
        st.builds(lambda c, x: op(c, op("sub", q, k), x), comparison, n),
        st.builds(lambda c, x: op(c, op("abs", op("sub", q, k)), x), comparison, n),
        st.builds(lambda c, m: op(c, *m), comparison, block),
        st.builds(lambda c, m: op(c, *m[::-1]), comparison, block),
        st.builds(lambda c, m, x: op(c, op("sub", *m), x), comparison, block, n),
        st.builds(lambda c, a, b, x: op(c, op("mul", k, a), op("add", op("mul", q, b), x)), comparison, n, n, n),
        st.builds(lambda c, x: op(c, k, op("add", x, data)), comparison, st.one_of(n.map(const), st.just(q))),
        st.builds(lambda c, x: op(c, k, op("maximum", q, x)), comparison, st.one_of(n.map(const), st.just(data))),
        st.builds(lambda c, x: op(c, x, anything), comparison, st.sampled_from([k, op("sub", k, q), op("sub", q, k)])),
        st.builds(lambda c: op(c, k, per_row), comparison),
        st.builds(lambda c: op(c, k, rising), comparison),
        st.builds(lambda c, x: op(c, op("add", k, rising), x), comparison, n),
        st.builds(lambda c: op(c, op("floordiv", k, extra), op("floordiv", q, extra)), comparison),
        st.builds(lambda c: op(c, op("sub", q, k), extra), comparison),
        st.builds(lambda m: op("eq", op("mod", op("sub", q, k), m), 0), size),
    )


def compositions() -> st.SearchStrategy[Expr]:
    join = lambda inner: st.one_of(  # noqa: E731
        st.builds(lambda c, a, b: op(c, a, b), st.sampled_from(["and", "or"]), inner, inner),
        st.builds(lambda a: op("not", a), inner),
    )
    return st.recursive(leaves(), join, max_leaves=4)


@settings(repeatable, max_examples=400)
@given(
    compositions(),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([-3, -1, 1, 2, 5, 2**63 - 1]),
    st.randoms(use_true_random=False),
)
def test_bounds_and_residual_are_the_predicate(keep: Expr, q_len: int, kv_len: int, extra: int, random: Any) -> None:
    """On the whole grid, for integers from tensors as large as there are; neither bound decreases with q."""
    huge, per_batch = (torch.tensor([random.choice(x) for _ in "01"]) for x in ([2, 2**63 - 1, -(2**63)], [-2, 0, 3, 7]))
    per_row = torch.tensor([random.randint(-2, 9) for _ in range(q_len)])
    rising = torch.tensor([random.choice([-2, 0, 3, 5, 7, 2**63 - 1]) for _ in range(q_len)]).sort().values
    given = problem(
        "float32", huge, per_batch, per_row, rising, batch=(2, 1), q_len=q_len, kv_len=kv_len, qk_dim=2,
        score=lambda s: op("where", keep, s, -math.inf), symbols={"extra": extra},
    )  # fmt: skip
    found = bounds.bounds(given.spec, keep, {RISING})
    mask = Mask(keep, given.spec.score, found.lower, found.upper, found.residual, -math.inf)
    spec = dataclasses.replace(given.spec, mask=mask)
    verify(spec)
    reference.check_mask(spec, given.operands, given.sizes)


def test_a_comparison_with_what_never_decreases_is_a_bound() -> None:
    keep = op("lt", K, Load("int64", 3, (Q,)))
    spec = problem("float32", torch.zeros(9, dtype=torch.int64), q_len=9, score=lambda s: op("where", keep, s, -math.inf)).spec
    assert bounds.bounds(spec, keep, {3}).upper is Load("int64", 3, (Q,)) and bounds.bounds(spec, keep).upper is None


def test_blocks_of_two_sizes_are_no_bounds() -> None:
    """As those of one size are, which is known when the kernel runs only."""
    n, m = symbol("n"), symbol("m")
    for size in (n, m, const(3)):
        keep = op("eq", op("floordiv", K, n), op("floordiv", Q, size))
        spec = problem("float32", symbols={"n": 2, "m": 3}, score=lambda s: op("where", keep, s, -math.inf)).spec  # noqa: B023
        found = bounds.bounds(spec, keep)
        assert (found.lower is not None, found.upper is not None, found.residual is keep) == (
            (size is n,) * 2 + (size is not n,)
        )
