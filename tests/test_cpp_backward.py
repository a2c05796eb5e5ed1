"""The C++ target in training: log-sum-exp of forward kernels, and gradients against the reference in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from gradients import check, floats, grad_out, run
from problems import (
    B0,
    D,
    E,
    K,
    Problem,
    Q,
    amid_nan,
    at_the_end_of_memory,
    bias_read_in_two_ways,
    crossed_heads,
    load,
    local_keys,
    one_key_for_all,
    op,
    problem,
    rand,
    unfolded_keys,
)
from specs import CASES
from together import asked, narrow, runs, together

from fuse import targets
from fuse.ir.spec import Operand
from fuse.kernel.destinations import Unsupported
from fuse.targets import reference
from fuse.targets.cpp import cpu
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import CppKernel, build
from fuse.targets.cpp.launch_backward import CppBackward, build_backward

pytestmark = pytest.mark.compiler

LANES = "avx512" if cpu.matrix_unit() else instruction_set()


NAMES = ("plain", "one_query", "causal_more_queries_than_keys", "two_extra_logits", "left_padding_and_causal", "sinks")
WAYS = [("float32", LANES, 1e-6), ("float64", LANES, 1e-14), ("bfloat16", "avx512_bf16", 2e-3)]


@pytest.fixture(scope="module")
def forwards(request: pytest.FixtureRequest) -> dict[tuple[str, str], CppKernel]:
    cases = [(p["name"], p["dtype"], p["isa"]) for p in asked(request, test_forward_gives_the_log_sum_exp_of_each_row)]
    specs = {(name, dtype): (CASES[name](dtype).spec, isa) for name, dtype, isa in cases if runs(isa)}
    with together(), narrow():
        return {case: CppKernel(spec, build(spec, isa)) for case, (spec, isa) in specs.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, isa, tolerance", WAYS)
def test_forward_gives_the_log_sum_exp_of_each_row(
    forwards: dict[tuple[str, str], CppKernel], name: str, dtype: str, isa: str, tolerance: float
) -> None:
    if not runs(isa):
        pytest.skip("no AVX512-BF16")
    p, kernel = CASES[name](dtype), forwards[name, dtype]
    out, lse = kernel.forward(p.operands, p.sizes)
    assert torch.equal(out.nan_to_num(), kernel(p.operands, p.sizes).nan_to_num())
    assert lse.shape == out.shape[:-1]
    exact = reference.attention_with_lse(p.spec, p.operands, p.sizes)[1]
    torch.testing.assert_close(lse.double(), exact, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------- gradients


Way = tuple[str, str, str]  # name, dtype, instruction set


def kernel(p: Problem, wanted: Sequence[bool], isa: str) -> CppBackward:
    return CppBackward(p.spec, wanted, build_backward(p.spec, wanted, isa))


# Each a path of its own: shapes and strides, tiles that are skipped, rows that are computed again, what terms are summed over.
GRADIENTS = (
    "no_batch", "three_batch_dimensions", "one_query", "one_key", "empty_batch", "vit_length", "head_dim_80", "head_dim_256",
    "value_narrower_than_key", "grouped_query", "features_strided", "packed_qkv", "flat_rows", "flat_rows_of_any_length",
    "views_of_vectors", "queries_on_a_diagonal", "heads_between_rows", "head_dim_7", "shared_keys_and_own_values",
    "one_query_and_one_key_without_their_indices", "causal_long", "causal_offset",
    "causal_more_queries_than_keys", "window", "shard_of_a_window", "left_padding_and_causal", "documents", "dense_additive",
    "integer_mask_product", "masked_rows_infinite_fill", "masked_rows_added_fill", "row_of_a_low_bias", "masked_rows_are_zero",
    "two_lowest_masks_overflow", "raised_to_the_largest_number",
    "masked_rows_with_sink", "alibi", "t5_bias", "relative_table", "decomposed_positions",
    "soft_cap_causal", "scalar_tensor_scale", "two_extra_logits", "weight_factor", "weight_masked_after_softmax",
    "gate_and_bias_of_keys",
    "no_keys_beside_a_low_sink", "no_keys_in_a_mapped_mask", "no_queries", "masked_rows_with_low_sinks",
    "masked_rows_with_two_low_sinks", "positions_in_bfloat16", "blocks_by_division_in_float32", "documents_in_float16",
    "score_in_bfloat16_decides", "coordinate_by_way_of_bfloat16", "weight_chosen_in_bfloat16",
    "sigmoid_attention", "squared_relu_causal", "retention", "retention_of_learned_decay", "linear_attention_causal",
    "divided_by_its_sum", "window_without_a_softmax", "padding_without_a_softmax", "biased_without_a_softmax",
    "no_keys_without_a_softmax", "weight_without_a_softmax", "groups_without_a_softmax",
)  # fmt: skip
# With blocks of one, two and three vectors of queries, as they are planned: what ends a block, and every kind of sum.
PLANNED = (
    "vit_length", "grouped_query", "features_strided", "causal_long", "window", "left_padding_and_causal", "documents",
    "dense_additive", "t5_bias", "relative_table", "two_extra_logits", "weight_factor", "masked_rows_with_low_sinks",
    "gate_and_bias_of_keys", "retention_of_learned_decay", "linear_attention_causal",
)  # fmt: skip
CHOSEN = [(n, "float32", LANES) for n in GRADIENTS]
CHOSEN += [(n, d, LANES) for n in ("transposed_output", "left_padding_and_causal") for d in ("float16", "bfloat16", "float64")]
CHOSEN += [(n, "float64", LANES) for n in ("masked_rows_with_low_sinks", "sum_of_products_in_float32", "soft_cap")]
CHOSEN += [("left_padding_and_causal", "float32", isa) for isa in ("avx2", "sse")]
CHOSEN += [("flat_rows", "bfloat16", LANES), ("one_query_and_one_key_without_their_indices", "bfloat16", LANES)]
# The matrix core: tails of queries, keys and features, masks, groups, strides, logits without a value, rows computed again.
MATRIX = ("vit_length", "head_dim_7", "grouped_query", "shared_keys_and_own_values", "features_strided", "causal_long",
          "views_of_vectors", "heads_between_rows", "window", "documents", "soft_cap_causal", "masked_rows_are_zero",
          "weight_masked_after_softmax", "no_keys",
          "masked_rows_with_low_sinks", "sigmoid_attention", "retention", "linear_attention_causal", "weight_without_a_softmax",
          "padding_without_a_softmax",
          "positions_in_bfloat16", "score_in_bfloat16_decides", "result_in_float32",
          "shard_of_a_window")  # fmt: skip
EMULATED = ("cross_attention", "head_dim_80", "value_narrower_than_key", "left_padding_and_causal", "two_extra_logits",
            "retention", "divided_by_its_sum", "result_in_float32")  # fmt: skip
CHOSEN += [(n, "bfloat16", "avx512_bf16") for n in MATRIX] + [(n, "bfloat16", "amx_emulated") for n in EMULATED]


@pytest.fixture(scope="module")
def backwards(request: pytest.FixtureRequest) -> dict[Way, CppBackward]:
    """Of all tests that were asked for."""
    ways = [params["chosen"] for params in asked(request, test_gradients_are_within_twice_the_error_of_eager)]
    with together():
        return {way: backward(*way) for way in ways if runs(way[2])}


def backward(name: str, dtype: str, isa: str) -> CppBackward:
    p = CASES[name](dtype)
    if name in PLANNED and dtype == "float32":
        return kernel(p, floats(p), isa)
    with narrow():
        return kernel(p, floats(p), isa)


@pytest.mark.parametrize("chosen", CHOSEN, ids="-".join)
def test_gradients_are_within_twice_the_error_of_eager(backwards: dict[Way, CppBackward], chosen: Way) -> None:
    name, dtype, isa = chosen
    if not runs(isa):
        pytest.skip(f"this machine has no {isa}")
    p = CASES[name](dtype)
    check(p, run(p, backwards[chosen]), floats(p))


def test_the_gradient_of_the_log_sum_exp_joins_that_of_the_result() -> None:
    p = CASES["two_extra_logits"]("float32")
    of_rows = rand(*p.spec.lse_shape(p.sizes))
    check(p, run(p, backward("two_extra_logits", "float32", LANES), of_rows), floats(p), of_rows)


def test_rows_of_low_scores_have_the_probabilities_that_forward_had() -> None:
    """Else what all scores of a row share would have a gradient. In float16 eager rounds such rows, which forward does not."""
    p = CASES["low_scores_beside_infinite_ones"]("float16")
    with together():
        forward, of_low = CppKernel(p.spec, build(p.spec, LANES)), kernel(p, floats(p), LANES)
    out, lse = forward.forward(p.operands, p.sizes)
    assert of_low(grad_out(p), p.operands, p.sizes, out, lse)[3][3:].abs().amax() < 0.02  # three rows see nothing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_length_around_the_tiles(dtype: str) -> None:
    for q_len in (1, 15, 17, 47, 49, 97, 145):
        for kv_len in (2, 7, 95, 97, 383, 385):
            p = problem(dtype, batch=(1, 1), q_len=q_len, kv_len=kv_len, qk_dim=24, v_dim=40)
            check(p, run(p, targets.backward_kernel(p.spec, "cpp", floats(p))), floats(p))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradients_in_float32_have_no_larger_mean_error_than_eager(scale: float) -> None:
    """Eager as users run it, with its own sums of products."""
    p = problem("float32", q_len=256, qk_dim=64)
    p.operands[0].mul_(scale)
    leaves = [t.clone().requires_grad_() for t in p.operands]
    eager = torch.autograd.grad((leaves[0] @ leaves[1].mT / 8).softmax(-1) @ leaves[2], leaves, grad_out(p))
    exact = reference.attention_backward(p.spec, grad_out(p), p.operands, p.sizes, floats(p), "exact")
    out, lse = targets.kernel(p.spec, "cpp").forward(p.operands, p.sizes)
    found = targets.backward_kernel(p.spec, "cpp", floats(p))(grad_out(p), p.operands, p.sizes, out, lse)
    for x, e, s in zip(found, exact, eager, strict=True):
        assert (x - e).square().mean().sqrt() <= 1.05 * (s - e).square().mean().sqrt()


def test_frozen_tensors_get_no_gradient() -> None:
    p, choices = CASES["causal_long"]("float32"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    with together(), narrow():
        kernels = {wanted: kernel(p, wanted, LANES) for wanted in (tuple(map(bool, choice)) for choice in choices)}
    for wanted, found in kernels.items():
        check(p, run(p, found), wanted)


@pytest.mark.parametrize("isa", [None, LANES])
@pytest.mark.parametrize("name", ["relative_table", "grouped_query", "causal_long"])
def test_gradients_do_not_depend_on_the_number_of_threads(name: str, isa: str | None) -> None:
    if isa is None and cpu.matrix_unit() is None:
        pytest.skip("no matrix core")
    p = CASES[name]("bfloat16" if isa is None else "float32")
    backward = kernel(p, floats(p), isa or instruction_set())
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(run(p, backward))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_gradients_of_the_result_may_be_expanded() -> None:
    """As that of ``out.sum()``: one number, with strides of zero."""
    p = CASES["plain"]("float32")
    out, lse = reference.attention_with_lse(p.spec, p.operands, p.sizes, "eager")
    backward = kernel(p, floats(p), LANES)
    one = torch.ones(()).expand(out.shape)
    found, dense = (backward(g, p.operands, p.sizes, out, lse) for g in (one, one.contiguous()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("batch", [(2, 3), (1, 3), (1, 1)])
def test_a_tensor_that_is_query_key_and_value_gets_their_sum(batch: tuple[int, int]) -> None:
    base = problem("float32", batch=batch)
    x = base.operands[0]
    query, key, value = (load(x, 0, *base.spec.query.coords[:2], *at) for at in ((Q, D), (K, D), (K, E)))
    spec = replace(base.spec, operands=(Operand(4, "float32"),), query=query, key=key, value=value)
    p = Problem(spec, [x], base.sizes)
    check(p, run(p, kernel(p, (True,), LANES)), (True,))


def test_a_query_that_all_batches_share_is_summed_over_them() -> None:
    base = problem("float32", batch=(4, 2))
    query = base.operands[0][0].contiguous()
    spec = replace(base.spec, query=load(query, 0, base.spec.query.coords[1], Q, D),
                   operands=(Operand(3, "float32"), *base.spec.operands[1:]))  # fmt: skip
    p = Problem(spec, [query, *base.operands[1:]], base.sizes)
    check(p, run(p, kernel(p, floats(p), LANES)), floats(p))


@pytest.mark.parametrize("dtype, isa", [("float32", LANES), ("bfloat16", "avx512_bf16")])
def test_what_lies_around_operands_is_not_read(dtype: str, isa: str) -> None:
    if not runs(isa):
        pytest.skip("no matrix core")
    for name in ("cross_attention", "head_dim_7"):
        p = amid_nan(CASES[name](dtype))
        backward = kernel(p, floats(p), isa)
        check(p, run(p, backward), floats(p))
        if sys.platform == "linux":
            p = at_the_end_of_memory(CASES[name](dtype))
            check(p, run(p, backward), floats(p))


def test_gradients_of_a_bias_that_is_read_in_two_ways_add_up() -> None:
    p = bias_read_in_two_ways()
    check(p, run(p, kernel(p, floats(p), LANES)), floats(p))


def test_heads_that_share_keys_and_values_crosswise_are_left_to_the_reference() -> None:
    p = crossed_heads()
    backward = kernel(p, floats(p), LANES)
    with pytest.warns(RuntimeWarning, match="left to the reference"):
        check(p, run(p, backward), floats(p))


@pytest.mark.parametrize("keys, apart, shared", [(local_keys, 8, 16), (one_key_for_all, 1, 20), (unfolded_keys, 1, 9)])
def test_calls_with_overlapping_keys_are_left_to_the_reference(keys: Callable[[int], Problem], apart: int, shared: int) -> None:
    left = pytest.warns(RuntimeWarning, match="batch indices or positions share parts of a gradient")
    for kv_len, said in ((apart, nullcontext()), (shared, left)):
        p = keys(kv_len)
        backward = targets.backward_kernel(p.spec, "cpp", floats(p))
        with said:
            check(p, run(p, backward), floats(p))
        assert backward.runs.by == "kernel" and ("share parts of" in backward.runs.why) is (kv_len == shared)


def test_a_gradient_of_overlapping_features_is_left_to_the_reference() -> None:
    base = problem("float32", batch=(3,))
    key = rand(37, 32)
    spec = replace(base.spec, operands=(base.spec.operands[0], Operand(2, "float32"), base.spec.operands[2]),
                   key=load(key, 1, K, op("add", op("mul", B0, 8), D)))  # fmt: skip
    p = Problem(spec, [base.operands[0], key, base.operands[2]], base.sizes)
    with pytest.raises(Unsupported):
        build_backward(p.spec, floats(p), LANES)
    targets.reset()
    with pytest.warns(RuntimeWarning, match="gradients.*batch indices or positions share parts of"):
        backward = targets.backward_kernel(p.spec, "cpp", floats(p))
    assert backward.runs.by == "reference" and "share parts of" in backward.runs.why
    check(p, run(p, backward), floats(p))
