"""Few queries on the Triton target: rows packed by what they share, parts of the keys, and when that is worth it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decode_specs import DECODING
from problems import B0, B1, Case, K, Problem, Q, hide, load, op, problem
from specs import CASES

from fuse.kernel import sharing
from fuse.targets import reference
from fuse.targets.triton import plan_decode
from fuse.targets.triton.plan import ARCHITECTURES, Architecture, shared_memory
from fuse.targets.triton.plan_decode import Route

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.targets.triton.launch import TritonKernel  # noqa: E402

COMMON = (
    "one_query", "one_key", "empty_batch", "no_batch", "head_dim_80", "three_batch_dimensions", "cross_attention",
    "heads_last_output", "key_stored_transposed", "packed_qkv", "packed_qkv_head_dim_24", "value_narrower_than_key",
    "causal_offset", "causal_more_queries_than_keys", "window", "documents", "mapped_bool", "dense_additive",
    "masked_rows_are_zero", "masked_rows_infinite_fill", "masked_rows_added_fill", "masked_rows_with_sink",
    "two_extra_logits", "weight_factor", "multi_query", "t5_bias",
    "squared_relu_causal", "linear_attention_causal", "padding_without_a_softmax", "weight_without_a_softmax",
)  # fmt: skip


def attended(made: Problem, parts: int) -> torch.Tensor:
    """The result in ``parts`` parts, whatever the sizes, or with 0 by the forward kernel; the rows' log-sum-exp is compared on
    the way."""
    kernel = TritonKernel(made.spec)
    route = plan_decode.packed(sharing.runs(made.spec), made.sizes, parts) if parts else None
    lse = torch.empty(made.spec.lse_shape(made.sizes), dtype=getattr(torch, made.spec.lse_dtype))
    out = kernel.launch(made.operands, made.sizes, lse, route)
    if out.numel():
        expected = reference.attention_with_lse(made.spec, made.operands, made.sizes, "eager")[1]
        torch.testing.assert_close(lse, expected, rtol=2e-2, atol=2e-2, equal_nan=True)
    return out


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("dtype, parts", [("float32", 3), ("bfloat16", 3), ("float16", 3), ("float64", 3), ("float32", 1)])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_is_within_twice_the_error_of_eager(name: str, dtype: str, parts: int) -> None:
    made = DECODING[name](dtype)
    made.check(attended(made, parts))


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("name", COMMON)
def test_parts_of_any_spec_are_merged(name: str) -> None:
    made = CASES[name]("float32")
    made.check(attended(made, 2))


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_row_that_sees_nothing_has_the_weight_of_its_sinks(parts: int) -> None:
    """However small they are; where the only one is minus infinity, it is NaN."""
    first, second = torch.tensor([-1e2, -2e3, -math.inf, -math.inf]), torch.tensor([-math.inf, -3e3, -1e2, -math.inf])
    logits, upper = (load(first, 3, B1), load(second, 4, B1)), op("sub", Q, 9)
    score = lambda s: hide(s, op("lt", K, upper), upper=upper)  # noqa: E731
    made = problem("float32", first, second, batch=(1, 4), q_len=13, extra_logits=logits, score=score)
    made.check(attended(made, parts))


# --------------------------------------------------------------------------------------------------- what shares keys


@pytest.mark.parametrize(
    "make, runs",
    [
        (DECODING["groups_of_8"], (1, 8)), (DECODING["groups_as_a_dimension"], (1, 1, sharing.ALL)),
        (DECODING["heads_71_to_1"], (1, sharing.ALL)), (DECODING["last_group_is_smaller"], (1, 3)),
        (CASES["packed_qkv"], (1, 1)), (CASES["no_batch"], ()),
    ],
)  # fmt: skip
def test_which_batch_indices_share_keys_is_read_off_the_index_maps(make: Case, runs: tuple[int, ...]) -> None:
    assert sharing.runs(make("float32").spec) == runs


def test_keys_and_values_that_are_shared_differently_are_shared_as_far_as_both_are() -> None:
    made = problem("float32", batch=(12,), kv_batch=(2,), kv_index=(op("floordiv", B0, 6),))
    value = load(made.operands[2], 2, op("floordiv", B0, 4), K, made.spec.value.coords[-1])
    assert sharing.runs(replace(made.spec, value=value)) == (2,)


# ------------------------------------------------------------------------------------------------------ when it is worth it


def test_one_query_is_packed_and_cut_until_the_processors_are_busy() -> None:
    assert plan_decode.route((1, 8), [1, 64, 1, 8192], 128, processors=132) == Route(rows=8, groups=8, parts=32)
    assert plan_decode.route((1, 8), [64, 64, 1, 8192], 128, processors=132) == Route(rows=8, groups=512, parts=1)


def test_a_part_has_some_keys_at_least() -> None:
    route = plan_decode.route((1, 1), [1, 2, 1, 600], 128, processors=132)
    assert route is not None and route.parts == 2


@pytest.mark.parametrize("q_len, kv_len, expected", [(512, 512, False), (4096, 4096, False), (64, 32768, True), (1, 10, True)])
def test_blocks_of_queries_that_fill_the_device_are_not_cut(q_len: int, kv_len: int, expected: bool) -> None:
    assert (plan_decode.route((1, 1), [1, 16, q_len, kv_len], 128, processors=108) is not None) == expected


@pytest.mark.parametrize(
    "rows, most, expected", [(1, 64, 16), (16, 64, 16), (17, 64, 32), (71, 64, 64), (40, 32, 32), (9, 16, 16)]
)
def test_a_tile_has_room_for_its_rows_and_not_much_more(rows: int, most: int, expected: int) -> None:
    assert plan_decode.block(rows, most) == expected


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("name, dtype", [("groups_of_8", "bfloat16"), ("member_bias", "float32")])
def test_plans_fit_every_architecture(name: str, dtype: str, arch: Architecture) -> None:
    spec = DECODING[name](dtype).spec
    assert all(shared_memory(spec, plan, arch) <= arch.shared for plan in plan_decode.plans(spec, arch))
