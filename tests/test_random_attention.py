"""Random attention as models write it, forward and gradients, by the kernels of every target.

FUSE_RANDOM_PROGRAMS=1000 pytest tests/test_random_attention.py -k triton
    takes as many programs in the place of the few of an ordinary run
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from random_attention import Attention, attentions
from together import for_queries
from torch import Tensor

import fuse
from fuse import targets

COUNT = int(os.environ.get("FUSE_RANDOM_PROGRAMS", "0"))
# What fails is shown as it was drawn: to find a smaller one would mean to build many kernels.
EACH = settings(
    derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
# Each a way of its own to be wrong, or to raise.
KNOWN = (
    Attention(heads=4, groups=4),
    Attention(packed="side by side", qk_dim=40, v_dim=5),
    Attention(kv_len=1),
    Attention(q_len=1, kv_len=1),
    Attention(heads=4, qk_dim=1, v_dim=1, q_len=1, kv_len=1),
    Attention(product="bmm", gate=(2, 1, 33, 1)),
    Attention(heads=1, groups=1, q_len=100, kv_len=100, bias=(1, 100, 100)),
    Attention(mask="odd rows see nothing", sink=-1e2),
)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*", "error:fuse .* attention without its kernels")


@pytest.mark.compiler
def test_cpp_is_within_twice_the_error_of_eager() -> None:
    check("cpp", COUNT or 6)


@pytest.mark.triton
def test_triton_is_within_twice_the_error_of_eager() -> None:
    pytest.importorskip("triton", reason="no Triton on this platform")
    import triton_interpreter  # noqa: F401  mends the interpreter

    check("triton", COUNT or 16, KNOWN)


def check(target: str, count: int, known: Sequence[Attention] = ()) -> None:
    """``known`` and ``count`` random programs: none raises, all are right, and fused unless einsum sums over one element."""

    @settings(EACH, max_examples=count)
    @given(attentions())
    def one(program: Attention) -> None:
        torch._dynamo.reset()
        fuse.reset()
        targets.reset()
        compiled = torch.compile(lambda *x: program(*x), backend="fuse", options={"inner": "eager", "target": target})
        inputs = [x.to(program.dtype) for x in program.inputs()]
        with for_queries(program.q_len):
            exact, eager, found = (
                results(f, x) for f, x in ((program, [t.double() for t in inputs]), (program, inputs), (compiled, inputs))
            )
        judge(program, inputs, exact, eager, found)
        assert fuse.report().fused or (program.product == "einsum" and 1 in (program.qk_dim, program.kv_len))

    for program in known:
        one = example(program)(one)
    one()


def results(program: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result, and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = program(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def judge(
    program: Attention, inputs: Sequence[Tensor], exact: Sequence[Tensor], eager: Sequence[Tensor], found: Sequence[Tensor]
) -> None:
    """Fails unless errors are about eager's: gradients that cancel, and sums of many entries, have the roundings of these."""
    entries = program.batch * program.heads * program.q_len * program.kv_len
    largest = max(1.0, *(float(x.nan_to_num().abs().max()) for x in exact[1:]))
    eps = max(torch.finfo(program.dtype).eps, 1e-13)  # eager in float64 is what is exact here
    names = ["the result", *(f"the gradient of input {i}" for i in range(len(inputs)))]
    counts = [1, *(entries // x.numel() for x in inputs)]
    for name, n, e, s, x in zip(names, counts, exact, eager, found, strict=True):
        assert x.shape == s.shape and x.dtype == s.dtype
        assert torch.equal(x.isnan(), s.isnan()), f"NaN in {name} where eager has none, or none where eager has NaN"
        error, allowed = ((t.double() - e).nan_to_num().abs().max() for t in (x, s))
        allowed = 2 * allowed + max(32, math.sqrt(n)) * eps * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
