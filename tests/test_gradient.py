"""Derivatives of expressions, against PyTorch's autograd through the reference evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import B0, B1, K, Problem, Q, cast, op, problem
from specs import CASES, RANDOM_CASES
from torch import Tensor

from fuse.ir.expr import FLOATS, Expr, Load, Prob, Score, const
from fuse.ir.gradient import Gradient, Term, derivative, gradient
from fuse.ir.operators import OPERATORS
from fuse.targets import reference, reference_tangent
from fuse.targets.evaluate import Call

S, P, X = Score("float64"), Prob("float64"), Load("float64", 0, (Q, K))


def evaluate(root: Expr, values: dict[Expr, Tensor]) -> Tensor:
    """``root`` on a grid of one row and as many keys as ``values`` have, differentiable."""
    made = problem("float64", batch=(), q_len=1, kv_len=len(values[S]), qk_dim=1)
    call = Call(made.spec, made.operands, made.sizes, exact=True)
    given = {n: v.reshape(1, -1) for n, v in values.items()}
    return call.grid(q=(0, 1), k=(0, call.kv_len)).evaluate(root, given).expand(1, call.kv_len).flatten()


def check(root: Expr, leaf: Expr, points: dict[Expr, list[float]]) -> None:
    values = {n: torch.tensor(x, dtype=torch.float64, requires_grad=n is leaf) for n, x in points.items()}
    result = evaluate(root, values)
    if result.requires_grad:
        (expected,) = torch.autograd.grad(result.sum(), values[leaf])
    else:
        expected = torch.zeros_like(result)
    found = evaluate(derivative(root, leaf), {n: v.detach() for n, v in values.items()})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


ALL_CASES = {**CASES, **RANDOM_CASES}
POINTS = {S: [-2.5, -1.0, -0.0, 0.25, 0.75, 2.0], X: [0.75, -1.0, 0.5, 0.25, 3.0, 2.0]}
POSITIVE = {S: [0.125, 0.5, 1.0, 1.75, 3.0], X: [2.0, 0.5, 0.25, 1.0, 3.0]}
FLOAT_UNARY = tuple(o.name for o in OPERATORS.values() if o.arity == 1 and o.name not in ("isnan", "isinf", "not", "cast"))
FLOAT_BINARY = ("add", "sub", "mul", "div", "pow", "minimum", "maximum", "mod")
ONLY_POSITIVE = ("log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "pow", "div", "mod")


@pytest.mark.parametrize("name", FLOAT_UNARY)
def test_functions_of_one_operand(name: str) -> None:
    check(op(name, S), S, POSITIVE if name in ONLY_POSITIVE else POINTS)


@pytest.mark.parametrize("leaf", [S, X], ids=["first", "second"])
@pytest.mark.parametrize("name", FLOAT_BINARY)
def test_functions_of_two_operands_with_ties(name: str, leaf: Expr) -> None:
    check(op(name, S, X), leaf, POSITIVE if name in ONLY_POSITIVE else POINTS)


@pytest.mark.parametrize("program", [lambda x: x.clamp(-1.0, 2.0), torch.relu, torch.nn.functional.hardtanh])
def test_bounds_that_are_met_exactly(program: Callable[[Tensor], Tensor]) -> None:
    """A learned temperature that was clamped lies on its bound."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return program(q @ k.mT).softmax(-1) @ v

    q = torch.tensor([[-1.0], [0.0], [1.0], [2.0], [3.0]], dtype=torch.float64).requires_grad_()
    k, v = torch.ones(1, 5, 1, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)[None, :, None]
    k[:, 1] = 2.0
    run = torch.compile(attend, backend="fuse", options={"inner": "eager", "target": "reference"})
    found = torch.autograd.grad(run(q[None], k, v).square().sum(), q)
    torch.testing.assert_close(found, torch.autograd.grad(attend(q[None], k, v).square().sum(), q))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, -1.0, 0.5])
def test_powers_with_a_constant_exponent(exponent: float) -> None:
    check(op("pow", S, exponent), S, POSITIVE)


@pytest.mark.parametrize("leaf", [S, X], ids=["base", "exponent"])
def test_powers_of_zero(leaf: Expr) -> None:
    check(op("pow", S, X), leaf, {S: [0.0, 0.0, 0.0], X: [0.0, 2.0, 1.0]})


def test_soft_cap() -> None:
    check(op("mul", op("tanh", op("div", S, 2.0)), 2.0), S, POINTS)


def test_what_is_not_chosen_has_no_say_even_if_it_is_infinite() -> None:
    root = op("where", op("gt", S, 0.0), op("sqrt", S), op("mul", S, 3.0))
    found = evaluate(derivative(root, S), {S: torch.tensor([0.0, 4.0], dtype=torch.float64)})
    assert found.tolist() == [3.0, 0.25]


def test_casts_between_floats_pass_the_derivative_and_casts_to_integers_do_not() -> None:
    narrow = Score("bfloat16")
    assert derivative(cast(narrow, "float32"), narrow) is const(1.0, "float32")
    assert derivative(cast(cast(S, "int64"), "float64"), S) is const(0.0, "float64")


def test_a_mask_leaves_the_scale() -> None:
    causal = op("le", K, Q)
    root = op("where", causal, op("mul", S, 0.25), const(-math.inf, "float64"))
    assert str(derivative(root, S)) == "where(k <= q, 0.25, 0)"


NAMES = [n for n in (*FLOAT_UNARY, *FLOAT_BINARY) if n not in ONLY_POSITIVE and n not in ("exp", "exp2", "expm1")]
leaves = st.one_of(st.sampled_from([S, X]), st.sampled_from([-1.5, 0.5, 1.0, 2.0]).map(lambda x: const(x, "float64")))


def grow(below: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def node(name: str, a: Expr, b: Expr) -> Expr:
        return (
            op("where", op("lt", a, b), a, op("mul", a, b)) if name == "where" else op(name, *(a, b)[: OPERATORS[name].arity])
        )

    return st.builds(node, st.sampled_from([*NAMES, "where"]), below, below)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.recursive(leaves, grow, max_leaves=8), st.sampled_from([S, X]))
def test_random_programs(root: Expr, leaf: Expr) -> None:
    check(root, leaf, {S: [-1.1, 0.3, 0.9], X: [0.6, -0.7, 1.3]})


# ------------------------------------------------------------------------------------------- what a backward computes


def of(name: str, *unwanted: int) -> Gradient:
    spec = CASES[name]("float32").spec
    wanted = tuple(o.dtype in FLOATS and i not in unwanted for i, o in enumerate(spec.operands))
    return gradient(spec, wanted)


def only(found: Gradient) -> Term:
    (term,) = found.terms
    return term


def test_a_dense_bias_is_stored_once_and_a_scale_per_head_is_summed() -> None:
    bias, scale = only(of("dense_additive")), only(of("learned_scale_per_head"))
    assert bias.distinct and {"q", "k"} <= bias.axes
    assert scale.distinct and scale.axes == {"b1"} and scale.load.coords[0] is B1


def test_a_table_by_distance_is_met_many_times() -> None:
    term = only(of("relative_table"))
    assert not term.distinct and {"q", "k"} <= term.axes


def test_sinks_and_gates_after_the_softmax_have_terms() -> None:
    assert only(of("sinks")).root == "extra_logits.0"
    assert only(of("weight_factor")).root == "weight"


def test_operands_that_are_not_wanted_have_no_terms() -> None:
    found = of("dense_additive", 0, 3)
    assert not found.terms and not found.query and found.key and found.value


def test_the_mask_is_out_of_the_derivative_where_everything_is_visible() -> None:
    found = of("causal")
    assert found.visible is const(0.25, "float32") and "where" in str(found.score)


def test_the_weight_of_a_mask_after_the_softmax_is_that_mask() -> None:
    assert str(of("weight_masked_after_softmax").weight) == "where(k <= q, 1, 0)"
    assert of("plain").weight is const(1.0, "float32") and B0 is not K


# ------------------------------------------------------------------------------------------ the reference's backward


def attend(made: Problem, operands: list[Tensor]) -> Tensor:
    """The spec by PyTorch's own autograd: the forward pass of the reference, differentiable."""
    call = Call(made.spec, operands, made.sizes, exact=True)
    found = call.probabilities((0, call.q_len), call.key())
    return call.entries(made.spec.weight, (0, call.q_len), {Prob: found.prob}) @ call.value()


def backward(name: str, precision: str = "exact") -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of all float operands of a case: the reference's, and autograd's."""
    made = ALL_CASES[name]("float64")
    wanted = [t.is_floating_point() for t in made.operands]
    operands = [t.clone().requires_grad_(w) for t, w in zip(made.operands, wanted, strict=True)]
    grad_out = torch.randn(made.spec.out_shape(made.sizes), dtype=torch.float64)
    leaves = [t for t in operands if t.requires_grad]
    expected = torch.autograd.grad(attend(made, operands), leaves, grad_out, materialize_grads=True)
    expected = [g.double() if precision == "exact" else g for g in expected]  # as it gives those of any float
    return reference.attention_backward(made.spec, grad_out, made.operands, made.sizes, wanted, precision), expected


# A row that is NaN gives NaN to all gradients; PyTorch's keeps it from those of queries and keys. An empty batch has none.
LEFT_OUT = (
    "low_scores_beside_infinite_ones",
    "masked_rows_infinite_fill",
    "masked_rows_with_low_sinks",
    "mapped_bool",
    "empty_batch",
)


@pytest.mark.parametrize("name", [n for n in ALL_CASES if n not in LEFT_OUT])
def test_the_backward_of_every_case_is_autograd_s(name: str) -> None:
    found, expected = backward(name)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", ["retention", "linear_attention_causal", "weight_without_a_softmax", "two_extra_logits"])
def test_tangents_are_pytorch_s_own(name: str) -> None:
    made = ALL_CASES[name]("float64")
    along = [torch.randn_like(t) if t.is_floating_point() else None for t in made.operands]
    pairs = [(t, x) for t, x in zip(made.operands, along, strict=True) if x is not None]

    def function(*floats: Tensor) -> Tensor:
        rest = iter(floats)
        return attend(made, [t if x is None else next(rest) for t, x in zip(made.operands, along, strict=True)])

    _, expected = torch.func.jvp(function, *map(tuple, zip(*pairs, strict=True)))
    found, _ = reference_tangent.attention_tangent(made.spec, made.operands, along, made.sizes)
    torch.testing.assert_close(found, expected)


def test_blocks_of_rows_add_up_to_the_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuse.targets.evaluate.BLOCK_ELEMENTS", 1)
    found, expected = backward("relative_table")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "soft_cap_causal", "sinks", "weight_factor", "dropout"])
def test_the_backward_is_the_slope_of_the_forward(name: str) -> None:
    """By finite differences along one direction, with no derivative of PyTorch's."""
    made = ALL_CASES[name]("float64")
    wanted = [t.is_floating_point() for t in made.operands]
    way = [torch.randn_like(t) if w else None for t, w in zip(made.operands, wanted, strict=True)]
    grad_out = torch.randn(made.spec.out_shape(made.sizes), dtype=torch.float64)

    def along(h: float) -> float:
        moved = [t if w is None else t + h * w for t, w in zip(made.operands, way, strict=True)]
        return float((reference.attention(made.spec, moved, made.sizes) * grad_out).sum())

    grads = reference.attention_backward(made.spec, grad_out, made.operands, made.sizes, wanted)
    slope = sum(float((g * w).sum()) for g, w in zip(grads, (w for w in way if w is not None), strict=True))
    assert (along(1e-5) - along(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_is_wanted_is_given_in_the_operand_s_dtype(dtype: str) -> None:
    made = CASES["dense_additive"](dtype)
    grad_out = torch.ones(made.spec.out_shape(made.sizes), dtype=getattr(torch, dtype))
    wanted = [False, True, False, True]
    found = reference.attention_backward(made.spec, grad_out, made.operands, made.sizes, wanted, "eager")
    assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t, w in zip(made.operands, wanted, strict=True) if w]


def test_the_log_sum_exp_of_rows_without_a_key() -> None:
    for name, value in (("masked_rows_are_zero", math.inf), ("masked_rows_infinite_fill", -math.inf)):
        made = CASES[name]("float32")
        _, lse = reference.attention_with_lse(made.spec, made.operands, made.sizes, "eager")
        assert lse.dtype == torch.float32 and lse.shape == (2, 3, 37)
        assert (lse == value).nonzero()[:, 2].unique().tolist() == [3] and lse[:, :, 4:].isfinite().all()
