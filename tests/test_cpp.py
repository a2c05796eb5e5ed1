"""Every named spec on the C++ target's lanes core; other dtypes where they take a path of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from specs import CASES

from fuse.runtime import cpu
from fuse.runtime.cpp import CppKernel, build, instruction_set

pytestmark = pytest.mark.compiler

# What is read, rounded, gathered and written by dtype; and rows whose result depends on eager's roundings.
BY_DTYPE = (
    "plain", "features_strided", "transposed_output", "one_query", "dense_additive", "relative_table", "sinks",
    "integer_mask_product", "left_padding_and_causal", "masked_rows_added_fill", "two_lowest_masks_overflow",
    "score_before_and_after_cast", "no_keys", "masked_rows_with_two_low_sinks",
)  # fmt: skip
# What decides is rounded to a narrower type than the one that is computed in.
IN_DOUBLE = ("positions_in_bfloat16", "blocks_by_division_in_float32", "sum_of_products_in_float32", "documents_in_float16",
             "large_numbers_in_float32", "overflow_of_float16_decides")  # fmt: skip
CHOSEN = [(name, "float32") for name in CASES] + [(n, d) for n in BY_DTYPE for d in ("bfloat16", "float16", "float64")]
CHOSEN += [(name, "float64") for name in IN_DOUBLE]
ISA = "avx512" if cpu.matrix_unit() else instruction_set()  # bfloat16 too: the matrix core has tests of its own


@pytest.fixture(scope="module", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """The kernels of all tests that were asked for, in parallel."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda p: build(CASES[p["name"]](p["dtype"]).spec, ISA), [item.callspec.params for item in items]))


@pytest.mark.parametrize("name, dtype", CHOSEN)
def test_kernel_is_as_close_to_float64_as_eager(name: str, dtype: str) -> None:
    problem = CASES[name](dtype)
    kernel = CppKernel(problem.spec, build(problem.spec, ISA))
    problem.check(kernel(problem.operands, problem.sizes))
