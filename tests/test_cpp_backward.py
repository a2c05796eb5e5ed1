"""The C++ target in training: the log-sum-exp that forward kernels leave for backward."""

from __future__ import annotations

import pytest
import torch
from specs import CASES

from fuse import reference
from fuse.runtime import cpu
from fuse.runtime.cpp import CppKernel, build, instruction_set

pytestmark = pytest.mark.compiler

LANES = "avx512" if cpu.matrix_unit() else instruction_set()


NAMES = ("plain", "one_query", "causal_more_queries_than_keys", "two_extra_logits", "left_padding_and_causal", "sinks")
WAYS = [("float32", LANES, 1e-6), ("float64", LANES, 1e-14), ("bfloat16", "avx512_bf16", 2e-3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, isa, tolerance", WAYS)
def test_forward_gives_the_log_sum_exp_of_each_row(name: str, dtype: str, isa: str, tolerance: float) -> None:
    if isa == "avx512_bf16" and cpu.matrix_unit() is None:
        pytest.skip("no AVX512-BF16")
    p = CASES[name](dtype)
    kernel = CppKernel(p.spec, build(p.spec, isa))
    out, lse = kernel.forward(p.operands, p.sizes)
    assert torch.equal(out.nan_to_num(), kernel(p.operands, p.sizes).nan_to_num())
    assert lse.shape == out.shape[:-1]
    exact = reference.attention_with_lse(p.spec, p.operands, p.sizes)[1]
    torch.testing.assert_close(lse.double(), exact, rtol=tolerance, atol=tolerance)
