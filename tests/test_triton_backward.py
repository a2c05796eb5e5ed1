"""The gradients of the Triton target, through Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from gradients import check, floats, grad_out, run
from problems import (
    B0,
    B1,
    KV_LEN,
    LOWEST,
    Q_LEN,
    D,
    E,
    K,
    Problem,
    Q,
    amid_nan,
    both,
    crossed_heads,
    hide,
    load,
    local_keys,
    one_key_for_all,
    op,
    problem,
    rand,
    unfolded_keys,
)
from specs import CASES, RANDOM_CASES

from fuse.ir.expr import Expr, const, symbol
from fuse.ir.spec import Mask, Operand
from fuse.targets import reference

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")]

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.targets.triton.launch import TritonKernel  # noqa: E402
from fuse.targets.triton.launch_backward import TritonBackward  # noqa: E402

# Each a path of its own: shapes and strides, tiles that are skipped, rows that are computed again, what terms are summed over.
GRADIENTS = (
    "no_batch", "one_query", "one_key", "empty_batch", "head_dim_80", "value_narrower_than_key", "grouped_query",
    "features_strided", "packed_qkv", "packed_qkv_head_dim_24", "flat_rows", "flat_rows_of_any_length",
    "views_of_vectors", "queries_on_a_diagonal", "heads_between_rows",
    "one_query_and_one_key_without_their_indices", "causal_long", "causal_offset",
    "causal_more_queries_than_keys", "window", "padding", "left_padding_and_causal", "documents", "dense_additive",
    "shard_of_a_window",
    "masked_rows_infinite_fill", "masked_rows_added_fill", "masked_rows_are_zero", "two_lowest_masks_overflow",
    "raised_to_the_largest_number", "row_of_a_low_bias",
    "masked_rows_with_sink", "alibi", "soft_cap_causal", "scalar_tensor_scale", "two_extra_logits", "weight_factor",
    "weight_masked_after_softmax", "relative_table", "t5_bias", "decomposed_positions",
    "sigmoid_attention", "squared_relu_causal", "retention", "retention_of_learned_decay", "linear_attention_causal",
    "divided_by_its_sum", "window_without_a_softmax", "padding_without_a_softmax", "biased_without_a_softmax",
    "weight_without_a_softmax", "groups_without_a_softmax",
)  # fmt: skip
CHOSEN = [(n, "float32") for n in GRADIENTS]
CHOSEN += [
    (n, d)
    for n in ("grouped_query", "left_padding_and_causal", "t5_bias", "linear_attention_causal", "result_in_float32")
    for d in ("bfloat16", "float16", "float64")
]
CHOSEN += [("soft_cap", "float64")]


def kernel(p: Problem, wanted: Sequence[bool] | None = None) -> TritonBackward:
    return TritonBackward(p.spec, wanted or floats(p))


@pytest.mark.parametrize("name, dtype", CHOSEN)
def test_gradients_are_within_twice_the_error_of_eager(name: str, dtype: str) -> None:
    p = CASES[name](dtype)
    check(p, run(p, kernel(p)), floats(p))


def test_rows_of_low_scores_have_the_probabilities_that_forward_had() -> None:
    """As of C++."""
    p = CASES["low_scores_beside_infinite_ones"]("float16")
    out, lse = TritonKernel(p.spec).forward(p.operands, p.sizes)
    assert kernel(p)(grad_out(p), p.operands, p.sizes, out, lse)[3][3:].abs().amax() < 0.02  # three rows see nothing


def test_the_gradient_of_the_log_sum_exp_joins_that_of_the_result() -> None:
    p = CASES["two_extra_logits"]("float32")
    of_rows = rand(*p.spec.lse_shape(p.sizes))
    check(p, run(p, kernel(p), of_rows), floats(p), of_rows)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)])
def test_frozen_tensors_get_no_gradient(wanted: tuple[bool, ...]) -> None:
    p = CASES["causal"]("float32")
    check(p, run(p, kernel(p, wanted)), wanted)


def test_bounds_that_step_are_searched() -> None:
    """Chunks of 50: lower and upper are no q + c."""
    first = op("mul", op("floordiv", Q, 50), 50)
    upper = op("minimum", op("add", first, 50), op("add", Q, 1))
    predicate = both(op("ge", K, first), op("lt", K, upper))
    p = problem("float32", batch=(1, 1), q_len=300, score=lambda s: hide(s, predicate, lower=first, upper=upper))
    check(p, run(p, kernel(p)), floats(p))


def test_a_table_of_distances_is_summed_over_tiles_and_over_rows_that_see_nothing() -> None:
    """A causal mask with a finite fill, from the last query back: the first ten rows average over every key."""
    table, last = rand(2, 119), op("add", Q, op("sub", KV_LEN, op("add", Q_LEN, 10)))
    place = op("add", op("sub", K, Q), op("sub", Q_LEN, 1))

    def score(s: Expr) -> tuple[Expr, Mask]:
        biased = op("add", s, load(table, 3, B1, place))
        return hide(biased, op("le", K, last), LOWEST["float32"], upper=op("add", last, 1))

    p = problem("float32", table, batch=(2, 2), q_len=70, kv_len=50, score=score)
    check(p, run(p, kernel(p)), floats(p))


def test_the_largest_distance_may_begin_a_tile() -> None:
    """65 distances, in tiles of 32."""
    table = rand(2, 65)
    place = op("add", op("sub", K, Q), 32)
    p = problem("float32", table, batch=(1, 2), q_len=33, score=lambda s: op("add", s, load(table, 3, B1, place)))
    assert kernel(p).plans.planned(torch.device("cpu")).distances.block_k == 32
    check(p, run(p, kernel(p)), floats(p))


def test_the_first_query_that_sees_a_tile_of_keys_may_end_a_tile_of_queries() -> None:
    """Each query sees the key behind it."""
    upper = op("add", Q, 2)
    p = problem("float32", batch=(1, 2), q_len=100, score=lambda s: hide(s, op("lt", K, upper), upper=upper))
    check(p, run(p, kernel(p)), floats(p))


def test_rows_that_are_computed_again_know_their_sink() -> None:
    """Of rows that see nothing the sink is the largest logit, and so small that the log-sum-exp has lost its digits."""
    sink, upper = torch.tensor([-2e3, LOWEST["float32"]]), op("sub", Q, 9)
    score = lambda s: hide(s, op("lt", K, upper), LOWEST["float32"], upper=upper)  # noqa: E731
    p = problem("float32", sink, batch=(1, 2), score=score, extra_logits=(load(sink, 3, B1),))
    check(p, run(p, kernel(p)), floats(p))


def looked_up(dtype: str) -> Problem:
    """A table read where another tensor says, as Swin reads it; seen from a prefix on with a finite fill."""
    table, places = rand(9, 2, dtype=dtype), torch.randint(9, (37, 37), generator=torch.Generator().manual_seed(0))

    def score(s: Expr) -> tuple[Expr, Mask]:
        biased = op("add", s, load(table, 3, load(places, 4, Q, K), B1))
        return hide(biased, op("le", op("add", K, 4), Q), LOWEST[dtype], upper=op("sub", Q, 3))

    return problem(dtype, table, places, batch=(2, 2), score=score)


def test_elements_that_entries_share_get_their_sum_over_rows_that_see_nothing_too() -> None:
    p = looked_up("float32")
    check(p, run(p, kernel(p)), floats(p))


def test_sums_in_no_determined_order_are_left_to_the_reference_where_torch_is_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p, asked = CASES["t5_bias"]("float32"), []
    real = reference.attention_backward
    monkeypatch.setattr(reference, "attention_backward", lambda *a: asked.append(a) or real(*a))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    backward = kernel(p)
    assert not backward.runs.why
    with pytest.warns(RuntimeWarning, match="gradients.*torch.use_deterministic_algorithms are left to the reference"):
        found = run(p, backward)
    assert asked and backward.runs.by == "kernel" and "left to the reference" in backward.runs.why
    check(p, found, floats(p))


def test_backward_drops_what_forward_dropped() -> None:
    """A gradient through a dropped entry would be wrong by its whole value."""
    p = RANDOM_CASES["dropout_causal_two_tiles"]("float32")
    found = run(p, kernel(p))
    exact = reference.attention_backward(p.spec, grad_out(p), p.operands, p.sizes, floats(p))
    for x, e in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), e, rtol=0, atol=8 * torch.finfo(x.dtype).eps * float(e.abs().amax()))


@pytest.mark.parametrize("name", ["cross_attention", "head_dim_7", "dense_additive"])
def test_what_lies_around_operands_is_not_read(name: str) -> None:
    p = amid_nan(CASES[name]("float32"))
    p.check(TritonKernel(p.spec)(p.operands, p.sizes))
    check(p, run(p, kernel(p)), floats(p))


def test_gradients_of_the_result_may_be_expanded() -> None:
    """As that of ``out.sum()``: one number, with strides of zero."""
    p = CASES["plain"]("float32")
    out, lse = reference.attention_with_lse(p.spec, p.operands, p.sizes, "eager")
    one = torch.ones(()).expand(out.shape)
    found, dense = (kernel(p)(g, p.operands, p.sizes, out, lse) for g in (one, one.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("batch", [(2, 3), (1, 3), (1, 1)])
def test_a_tensor_that_is_query_key_and_value_gets_their_sum(batch: tuple[int, int]) -> None:
    base = problem("float32", batch=batch)
    x = base.operands[0]
    query, key, value = (load(x, 0, *base.spec.query.coords[:2], *at) for at in ((Q, D), (K, D), (K, E)))
    spec = replace(base.spec, operands=(Operand(4, "float32"),), query=query, key=key, value=value)
    p = Problem(spec, [x], base.sizes)
    check(p, run(p, kernel(p)), (True,))


def test_batch_indices_share_query_key_value_and_bias_each_in_another_way() -> None:
    bias = rand(1, 2, 37, 37)
    base = problem("float32", bias, batch=(2, 2), score=lambda s: op("add", s, load(bias, 3, const(0), B1, Q, K)))
    query, key, value = base.operands[0][0].contiguous(), base.operands[1][:, 0].contiguous(), base.operands[2]
    spec = replace(base.spec, query=load(query, 0, B1, Q, D), key=load(key, 1, B0, K, D),
                   operands=(Operand(3, "float32"), Operand(3, "float32"), *base.spec.operands[2:]))  # fmt: skip
    p = Problem(spec, [query, key, value, bias], base.sizes)
    check(p, run(p, kernel(p)), floats(p))


def test_batch_indices_are_grouped_anew_where_a_number_of_the_call_says_what_they_share() -> None:
    """One kernel, of groups of two and then of three."""
    backward = None
    for n in (2, 3):
        p = problem("float32", batch=(6,), kv_batch=(6 // n,), kv_index=(op("floordiv", B0, symbol("n")),), symbols={"n": n})
        backward = backward or kernel(p)
        check(p, run(p, backward), floats(p))


def test_heads_share_keys_and_values_crosswise() -> None:
    p = crossed_heads()
    check(p, run(p, kernel(p)), floats(p))


@pytest.mark.parametrize(
    "p, left", [(local_keys(8), False), (local_keys(16), True), (one_key_for_all(20), True), (unfolded_keys(9), True)]
)
def test_calls_with_overlapping_keys_are_left_to_the_reference(p: Problem, left: bool) -> None:
    backward = kernel(p)
    check(p, run(p, backward), floats(p))
    assert ("share parts of" in backward.runs.why) is left


def test_training_a_model_calls_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are transposed views, and the gradient of the result has the layout of the product behind it."""
    monkeypatch.setattr(reference, "attention_backward", None)
    projection = torch.nn.Linear(32, 96)

    def model(x: torch.Tensor) -> torch.Tensor:
        q, k, v = projection(x).view(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 20, 32)

    x, grads = torch.randn(2, 20, 32), []
    for run_it in (model, torch.compile(model, backend="fuse", options={"target": "triton", "inner": "eager"})):
        projection.zero_grad()
        run_it(x).square().sum().backward()
        grads.append(projection.weight.grad.clone())
    torch.testing.assert_close(*grads)
