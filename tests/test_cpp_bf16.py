"""bfloat16 on the matrix core: every named spec, and what its fixed softmax reference must survive."""

from __future__ import annotations

import pytest
from specs import CASES

from fuse.runtime import cpu
from fuse.runtime.cpp import CppKernel, build

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(cpu.matrix_unit() is None, reason="no AVX512-BF16"),
]


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_as_close_to_float64_as_eager(name: str) -> None:
    problem = CASES[name]("bfloat16")
    kernel = CppKernel(problem.spec, build(problem.spec, "avx512_bf16"))
    problem.check(kernel(problem.operands, problem.sizes))
