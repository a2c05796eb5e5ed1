"""Every named spec on the C++ target's lanes core; other dtypes where they take a path of their own."""

from __future__ import annotations

import pytest
from specs import CASES
from together import asked, for_queries, narrow, together

from fuse.targets.cpp import cpu
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import CppKernel, build

pytestmark = pytest.mark.compiler

# What is read, rounded, gathered and written by dtype; and rows whose result depends on eager's roundings.
BY_DTYPE = (
    "plain", "features_strided", "transposed_output", "one_query", "dense_additive", "relative_table", "sinks",
    "integer_mask_product", "left_padding_and_causal", "masked_rows_added_fill", "two_lowest_masks_overflow",
    "raised_to_the_largest_number",
    "score_before_and_after_cast", "no_keys", "masked_rows_with_two_low_sinks",
)  # fmt: skip
# What decides is rounded to a narrower type than the one that is computed in.
IN_DOUBLE = ("positions_in_bfloat16", "blocks_by_division_in_float32", "sum_of_products_in_float32", "documents_in_float16",
             "large_numbers_in_float32", "overflow_of_float16_decides")  # fmt: skip
# Layouts, and rows that are few, end a tile, see nothing or read at strides: by the kernel as it is planned, with an instance
# for each number of vectors in a block, and one for few queries.
PLANNED = (
    "plain", "no_batch", "one_query", "one_key", "no_keys", "vit_length", "head_dim_1", "head_dim_80", "head_dim_256",
    "value_narrower_than_key", "shared_keys_and_own_values", "transposed_output", "features_strided", "packed_qkv_head_dim_24",
    "causal_long", "window", "left_padding_and_causal", "masked_rows_lowest_fill", "t5_bias", "two_extra_logits",
)  # fmt: skip
CHOSEN = [(name, "float32") for name in CASES] + [(n, d) for n in BY_DTYPE for d in ("bfloat16", "float16", "float64")]
CHOSEN += [(name, "float64") for name in IN_DOUBLE]
ISA = "avx512" if cpu.matrix_unit() else instruction_set()  # bfloat16 too: the matrix core has tests of its own


Kernels = dict[tuple[str, str], CppKernel]


def kernel(name: str, dtype: str) -> CppKernel:
    """Beside those of PLANNED with two vectors of queries in a block, by dtype with one."""
    p, single = CASES[name](dtype), dtype == "float32"
    with for_queries(p.q_len) if single and name in PLANNED else narrow(1 + single, decode_queries=4 * (p.q_len <= 4)):
        return CppKernel(p.spec, build(p.spec, ISA))


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    cases = [(p["name"], p["dtype"]) for p in asked(request, test_kernel_is_within_twice_the_error_of_eager)]
    with together():
        return {case: kernel(*case) for case in cases}


@pytest.mark.parametrize("name, dtype", CHOSEN)
def test_kernel_is_within_twice_the_error_of_eager(kernels: Kernels, name: str, dtype: str) -> None:
    problem = CASES[name](dtype)
    problem.check(kernels[name, dtype](problem.operands, problem.sizes))
