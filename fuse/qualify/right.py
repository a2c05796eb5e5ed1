"""Is a kernel right? Its results and gradients on small problems, beside the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse import targets
from fuse.ops.warm import ExpectedCall
from fuse.qualify.problem import Problem, small
from fuse.targets import reference

# Eager's error is one draw of rounding errors, a kernel's another: they are seldom so many times apart. Where scores are large,
# the last bit of one decides between two values, so that the largest error is of few entries.
_ROUNDINGS = 32
_PROBLEMS = ((1.0, 4), (30.0, 16))  # how large scores are, and how many times eager's error a kernel's may be


@dataclass(frozen=True)
class Finding:
    """The largest errors of one ``part``, "the result" or "the gradient of operand 1"; ``at`` which place of it.

    error, eager  of the kernel and of eager, absolute
    allowed       the largest that passes
    """

    part: str
    error: float
    eager: float
    allowed: float
    at: tuple[int, ...] = ()

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed

    def __str__(self) -> str:
        return f"error {self.error:.1e} of {self.part} where eager has {self.eager:.1e}, at {list(self.at)}"


def findings(call: ExpectedCall, wanted: Sequence[bool]) -> Iterator[Finding]:
    """What there is to say of the kernels of ``call``: forward, and backward where gradients are ``wanted``.

    Raises what the kernels raise.
    """
    for seed, (factor, times) in enumerate(_PROBLEMS):
        yield from _of_problem(small(call, wanted, seed, factor), call.target, tuple(wanted), times)


def _of_problem(p: Problem, target: str, wanted: tuple[bool, ...], times: int) -> Iterator[Finding]:
    kernel = targets.kernel(p.spec, target)
    exact, eager = (reference.attention(p.spec, p.operands, p.sizes, precision) for precision in ("exact", "eager"))
    if not any(wanted):
        yield _compared("the result", kernel(p.operands, p.sizes), exact, eager, times)
        return
    out, lse = kernel.forward(p.operands, p.sizes)
    yield _compared("the result", out, exact, eager, times)
    grad = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(2), device=out.device).to(out.dtype)
    found = targets.backward_kernel(p.spec, target, wanted)(grad, p.operands, p.sizes, out, lse)
    exacts, eagers = (
        reference.attention_backward(p.spec, grad, p.operands, p.sizes, wanted, precision) for precision in ("exact", "eager")
    )
    numbers = [i for i, w in enumerate(wanted) if w]
    for number, mine, truth, plain in zip(numbers, found, exacts, eagers, strict=True):
        yield _compared(f"the gradient of operand {number}", mine, truth, plain, times)


def _compared(part: str, found: Tensor, exact: Tensor, eager: Tensor, times: int) -> Finding:
    """NaN where eager has none, or none where it has some, is an infinite error. A few roundings of the largest are none."""
    if found.numel() == 0:
        return Finding(part, 0.0, 0.0, 0.0)
    plain = (eager.double() - exact).nan_to_num().abs().amax().item()
    error = (found.double() - exact).nan_to_num().abs()
    error = error.masked_fill(found.isnan() != eager.isnan(), torch.inf)
    at = torch.unravel_index(error.argmax(), error.shape)
    size = max(1.0, exact.nan_to_num().abs().amax().item())
    allowed = times * plain + _ROUNDINGS * torch.finfo(found.dtype).eps * size
    return Finding(part, error.amax().item(), plain, allowed, tuple(int(i) for i in at))
