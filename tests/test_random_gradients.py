"""Gradients of random scores under random masks, with grouped queries and dropout: the reference's are those of autograd and
of finite differences, the kernels' are the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from gradients import check, floats, grad_out, run
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import B0, B1, KV_LEN, LOWEST, K, Problem, Q, both, cast, hide, load, op, problem, rand
from test_gradient import attend
from together import narrow, together

from fuse.ir import expr
from fuse.ir.expr import Expr, Prob, const
from fuse.ir.gradient import differentiable
from fuse.ir.spec import Mask
from fuse.targets import reference
from fuse.targets.cpp.launch_backward import CppBackward, build_backward

HEADS, GROUPS, Q_COUNT, KEYS = 4, 2, 19, 23
Masking = Callable[[Expr, str], Expr | tuple[Expr, Mask]]

# ---------------------------------------------------------------------------------------------------------- programs

# What a score reads beside queries and keys, as operands 3 to 7: of every shape that a gradient is summed for.
TABLE = torch.arange(Q_COUNT)[:, None] * 3 % 7 + torch.arange(KEYS) % 4
SHAPES = ((HEADS,), (2, KEYS), (2, HEADS, Q_COUNT), (Q_COUNT, KEYS), (HEADS, Q_COUNT + KEYS - 1), (10, HEADS))
LOADS: list[tuple[Expr, ...]] = [
    (B1,), (B0, K), (B0, B1, Q), (Q, K), (B1, op("add", op("sub", K, Q), Q_COUNT - 1)), (load(TABLE, 9, Q, K), B1),
]  # fmt: skip


def leaf(dtype: str, number: int) -> Expr:
    return expr.Load(dtype, 3 + number, LOADS[number])


Program = Callable[[Expr, str], Expr]


def programs() -> st.SearchStrategy[Program]:
    """Scores of bounded slope in the scaled product ``s`` and in what is loaded."""
    learned = st.integers(0, len(SHAPES) - 1)
    steps: list[st.SearchStrategy[Program]] = [
        st.builds(lambda n: lambda s, t: op("add", s, leaf(t, n)), learned),
        st.builds(lambda n: lambda s, t: op("mul", s, leaf(t, n)), learned),
        st.builds(lambda n: lambda s, t: op("mul", op("tanh", op("div", s, 2.0)), op("exp", op("tanh", leaf(t, n)))), learned),
        st.builds(lambda n: lambda s, t: op("where", op("lt", s, leaf(t, n)), op("mul", s, 0.5), leaf(t, n)), learned),
        st.builds(lambda n: lambda s, t: op("maximum", s, op("neg", leaf(t, n))), learned),
        st.just(lambda s, t: op("sub", s, op("mul", cast(op("abs", op("sub", K, Q)), t), 0.25))),
    ]  # fmt: skip
    chain = st.lists(st.one_of(steps), min_size=1, max_size=3)

    def composed(chosen: list[Program]) -> Program:
        def program(s: Expr, dtype: str) -> Expr:
            for step in chosen:
                s = step(s, dtype)
            return s

        return program

    return chain.map(composed)


_SEEN = load(torch.ones(2, KEYS, dtype=torch.bool), 10, B0, K)
MASKS: dict[str, Masking] = {
    "none": lambda s, t: s,
    "causal": lambda s, t: hide(s, op("le", K, Q), upper=op("add", Q, 1)),
    "window": lambda s, t: hide(
        s, both(op("le", K, op("add", Q, 4)), op("ge", K, op("sub", Q, 3))), -1e9 if t != "float16" else LOWEST[t],
        lower=op("sub", Q, 3), upper=op("add", Q, 5),
    ),
    "padding": lambda s, t: hide(s, _SEEN),
    "padding below the diagonal": lambda s, t: hide(
        s, both(op("le", K, op("add", Q, op("sub", KV_LEN, Q_COUNT))), _SEEN), LOWEST[t],
        upper=op("add", op("add", Q, op("sub", KV_LEN, Q_COUNT)), 1), residual=_SEEN,
    ),
    "every third": lambda s, t: hide(s, op("ne", op("mod", op("add", Q, K), 3), 0), -math.inf),
}  # fmt: skip


def weights() -> st.SearchStrategy[Program]:
    """What follows the softmax: nothing, a gate for each head, or dropout."""

    def dropped(p: Expr, t: str) -> Expr:
        seed = expr.Load("int64", 11, (const(0),))
        number = expr.apply("uniform", seed, op("add", op("mul", B0, HEADS), B1), Q, K, dtype="float32")
        return op("where", op("lt", number, torch.tensor(0.75).item()), op("div", p, 0.75), const(0.0, t))

    gates: list[Program] = [lambda p, t: p, lambda p, t: op("mul", p, leaf(t, 0)), dropped]
    return st.sampled_from(gates)


Draw = tuple[Program, Masking, Program, bool, bool]
draws = st.tuples(programs(), st.sampled_from(list(MASKS.values())), weights(), st.booleans(), st.booleans())


def made(draw: Draw, dtype: str) -> Problem:
    program, mask, weight, grouped, sink = draw
    keep = torch.arange(KEYS) < torch.tensor([[KEYS - 6], [KEYS]])
    learned = [rand(*shape, dtype=dtype, seed=n) for n, shape in enumerate(SHAPES)]
    groups = {"kv_batch": (2, GROUPS), "kv_index": (B0, op("floordiv", B1, HEADS // GROUPS))} if grouped else {}
    return problem(
        dtype, *learned, TABLE, keep, torch.tensor([0x1234567]), batch=(2, HEADS), q_len=Q_COUNT, kv_len=KEYS, qk_dim=8,
        score=lambda s: mask(program(s, dtype), dtype), weight=cast(weight(Prob(dtype), dtype), dtype),
        extra_logits=(leaf(dtype, 0),) if sink else (), **groups,  # type: ignore[arg-type]
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- claims


@settings(derandomize=True, max_examples=60, deadline=None)
@given(draws)
def test_the_reference_has_the_gradients_of_autograd(draw: Draw) -> None:
    p = made(draw, "float64")
    operands = [t.clone().requires_grad_(t.is_floating_point()) for t in p.operands]
    leaves = [t for t in operands if t.requires_grad]
    expected = torch.autograd.grad(attend(p, operands), leaves, grad_out(p), allow_unused=True, materialize_grads=True)
    found = reference.attention_backward(p.spec, grad_out(p), p.operands, p.sizes, floats(p))
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-10)


@settings(derandomize=True, max_examples=12, deadline=None)
@given(draws)
def test_the_reference_s_gradients_are_slopes(draw: Draw) -> None:
    """gradcheck along one direction; where a score has kinks, nearly every point is beside them."""
    p = made(draw, "float64")
    generator = torch.Generator().manual_seed(5)
    way = [
        torch.randn(t.shape, generator=generator, dtype=t.dtype) if w else None
        for t, w in zip(p.operands, floats(p), strict=True)
    ]

    def along(h: float) -> float:
        moved = [t if w is None else t + h * w for t, w in zip(p.operands, way, strict=True)]
        return float((reference.attention(p.spec, moved, p.sizes) * grad_out(p)).sum())

    grads = reference.attention_backward(p.spec, grad_out(p), p.operands, p.sizes, floats(p))
    slope = sum(float((g * w).sum()) for g, w in zip(grads, (w for w in way if w is not None), strict=True))
    assert (along(1e-6) - along(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype, count", [("float32", 8), ("bfloat16", 4)])
def test_kernels_have_the_reference_s_gradients(dtype: str, count: int) -> None:
    """In bfloat16, which is another type to load and to round to, the first of the same programs."""
    found: list[Problem] = []

    @settings(derandomize=True, max_examples=count, deadline=None, database=None)
    @given(draws)
    def collect(draw: Draw) -> None:
        found.append(made(draw, dtype))

    collect()
    with together(), narrow():
        kernels = [CppBackward(p.spec, w := differentiable(p.spec), build_backward(p.spec, w)) for p in found]
    for p, kernel in zip(found, kernels, strict=True):
        check(p, run(p, kernel), differentiable(p.spec))
