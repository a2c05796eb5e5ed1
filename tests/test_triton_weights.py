"""Weights of every named spec on the Triton target, through Triton's interpreter."""

from __future__ import annotations

import pytest
from test_weights import ALL, BY_DTYPE, averaged, check

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.targets.triton.launch import TritonKernel  # noqa: E402
from fuse.targets.triton.launch_weights import TritonWeights  # noqa: E402

CHOSEN = [(name, "float32") for name in ALL] + [(n, d) for n in BY_DTYPE for d in ("bfloat16", "float16", "float64")]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("name, dtype", CHOSEN)
def test_a_kernel_writes_what_the_reference_says(name: str, dtype: str) -> None:
    p = ALL[name](dtype)
    _, lse = TritonKernel(p.spec).forward(p.operands, p.sizes)
    check(p, TritonWeights(p.spec)(p.operands, lse, p.sizes, 0), 0)
    if p.spec.batch:
        heads = p.sizes[p.spec.batch - 1]
        check(averaged(p), TritonWeights(averaged(p).spec)(p.operands, lse, p.sizes, heads), heads)
