"""Dropout behind the softmax in C++ kernels: the random numbers are the reference's, bit for bit, forward and backward."""

from __future__ import annotations

import pytest
import torch
from problems import rand
from specs import RANDOM_CASES
from together import asked, for_queries, runs, together

from fuse.targets import reference
from fuse.targets.cpp import cpu
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import CppKernel, build
from fuse.targets.cpp.launch_backward import CppBackward, build_backward

pytestmark = pytest.mark.compiler

LANES = "avx512" if cpu.matrix_unit() else instruction_set()
WAYS = [("float32", LANES), ("float32", "avx2"), ("float64", LANES), ("bfloat16", "avx512_bf16")]


Kernels = dict[tuple[str, str, str], CppKernel]


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    cases = [(p["name"], p["dtype"], p["isa"]) for p in asked(request, test_what_is_dropped_is_what_the_reference_drops)]
    with together():
        return {case: kernel(*case) for case in cases if runs(case[2])}


def kernel(name: str, dtype: str, isa: str) -> CppKernel:
    p = RANDOM_CASES[name](dtype)
    with for_queries(p.q_len):
        return CppKernel(p.spec, build(p.spec, isa))


@pytest.mark.parametrize("dtype, isa", sorted(set(WAYS)))
@pytest.mark.parametrize("name", RANDOM_CASES)
def test_what_is_dropped_is_what_the_reference_drops(kernels: Kernels, name: str, dtype: str, isa: str) -> None:
    if not runs(isa):
        pytest.skip("not on this machine")
    p = RANDOM_CASES[name](dtype)
    p.check(kernels[name, dtype, isa](p.operands, p.sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_drops_what_forward_dropped(dtype: str) -> None:
    """A gradient through a dropped entry would be wrong by its whole value."""
    p = RANDOM_CASES["dropout_causal_two_tiles"](dtype)
    wanted = tuple(t.is_floating_point() for t in p.operands)
    grad = rand(*p.spec.out_shape(p.sizes), dtype=dtype, seed=9)
    out, lse = reference.attention_with_lse(p.spec, p.operands, p.sizes, "eager")
    found = CppBackward(p.spec, wanted, build_backward(p.spec, wanted))(grad, p.operands, p.sizes, out, lse)
    exact = reference.attention_backward(p.spec, grad, p.operands, p.sizes, wanted)
    for x, e in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), e, rtol=0, atol=8 * torch.finfo(x.dtype).eps * float(e.abs().amax()))
