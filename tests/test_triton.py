"""Every named spec on the Triton target, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from specs import CASES, RANDOM_CASES

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_interpreter  # noqa: E402, F401  mends the interpreter
from triton.runtime.errors import InterpreterError  # noqa: E402

from fuse.targets.triton.launch import TritonKernel  # noqa: E402
from fuse.targets.triton.module import precision  # noqa: E402

# What is read, rounded and multiplied by dtype; and rows whose result depends on eager's roundings.
BY_DTYPE = (
    "plain", "head_dim_24", "packed_qkv_head_dim_24", "features_strided", "grouped_query", "causal_long", "window",
    "shard_of_a_window",
    "documents_in_any_order", "mapped_bool", "dense_additive", "relative_table", "sinks", "soft_cap_causal",
    "left_padding_and_causal", "masked_rows_lowest_fill", "masked_rows_added_fill", "two_lowest_masks_overflow",
    "raised_to_the_largest_number",
    "score_before_and_after_cast", "weight_masked_after_softmax", "result_in_float32",
    "small_weights_divided_by_themselves",
)  # fmt: skip
CHOSEN = [(name, "float32") for name in CASES] + [(n, d) for n in BY_DTYPE for d in ("bfloat16", "float16", "float64")]
CHOSEN += [("small_weights_in_float64_divided_by_themselves", "float16")]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("name, dtype", CHOSEN)
def test_kernel_is_within_twice_the_error_of_eager(name: str, dtype: str) -> None:
    problem = CASES[name](dtype)
    problem.check(TritonKernel(problem.spec)(problem.operands, problem.sizes))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", RANDOM_CASES)
def test_what_is_dropped_is_what_the_reference_drops(name: str, dtype: str) -> None:
    problem = RANDOM_CASES[name](dtype)
    problem.check(TritonKernel(problem.spec)(problem.operands, problem.sizes))


@pytest.mark.parametrize("name, tf32, ieee", [("fp32_precision", "tf32", "ieee"), ("allow_tf32", True, False)])
def test_products_in_float32_are_as_precise_as_torch_is_told_by_either_name(name: str, tf32: object, ieee: object) -> None:
    try:
        setattr(torch.backends.cuda.matmul, name, tf32)
        assert precision() == "tf32"
    finally:
        setattr(torch.backends.cuda.matmul, name, ieee)
    assert precision() == "ieee"


@triton.jit
def copy(source, to, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(to + lane, tl.load(source + lane))


def test_the_interpreter_notices_what_lies_outside_of_every_tensor() -> None:
    memory, to = torch.arange(64.0), torch.zeros(32)
    copy[(1,)](memory[16:48], to, 32)
    assert torch.equal(to, memory[16:48])
    for source, place in ((memory[:31], to), (memory[:32], to[:31])):
        with pytest.raises(InterpreterError, match="1 of 32 addresses lie outside"):
            copy[(1,)](source, place, 32)
