"""Is a kernel right? Its results and gradients on small problems, beside the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fuse import targets
from fuse.ir.spec import AttentionSpec
from fuse.ops.attention import parsed
from fuse.ops.warm import ExpectedCall
from fuse.qualify.problem import Problem, map_used, of_map, small
from fuse.targets import reference
from fuse.targets.protocols import Backward, Kernel, MapKernel, WeightsKernel
from fuse.torch_private import TorchDispatchMode

# Eager's error is one draw of rounding errors, a kernel's another: they are seldom so many times apart. Where scores are large,
# the last bit of one decides between two values, so that the largest error is of few entries.
_ROUNDINGS = 32
_PROBLEMS = ((1.0, 4), (30.0, 16))  # how large scores are, and how many times eager's error a kernel's may be
# The error of one number may be next to nothing by chance: of so few, eager's is the largest of several draws.
_FEW, _DRAWS = 16, 5
_RESULT, _WEIGHTS, _MAP = "the result", "the weights", "the map of its mask"


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
    """What there is to say of the kernels of ``call``: forward, of weights, and backward where gradients are ``wanted``.

    Raises what the kernels raise.
    """
    for seed, (factor, times) in enumerate(_PROBLEMS):
        asked = _asked(small(call, wanted, seed, factor), tuple(wanted), call.weights)
        few = any(part.exact.numel() < _FEW for part in asked.parts)
        seeds = range(len(_PROBLEMS) + 1, len(_PROBLEMS) + _DRAWS) if few else ()
        others = [_asked(small(call, wanted, other, factor), tuple(wanted), call.weights) for other in seeds]
        yield from _judged(asked, _Kernels.of(asked, call.target), times, others)


def findings_of(p: Problem, kernel: Kernel, backward: Backward | None, wanted: Sequence[bool]) -> Iterator[Finding]:
    """As ``findings``, of these kernels and one problem; no map of tiles is asked for."""
    asked = _asked(p, tuple(wanted))
    parts = tuple(part for part in asked.parts if part.name != _MAP)
    yield from _judged(replace(asked, parts=parts), _Kernels(kernel, backward), _PROBLEMS[0][1])


def _judged(asked: _Asked, kernels: _Kernels, times: float, others: Sequence[_Asked] = ()) -> Iterator[Finding]:
    for i, (part, found) in enumerate(zip(asked.parts, _answers(asked, kernels), strict=True)):
        eager = max([part.eager_error, *(other.parts[i].eager_error for other in others)])
        yield _compared(part, found, times * eager, 1.0 if part.of_result else asked.problem.terms)


@dataclass(frozen=True)
class _Part:
    """The result, one of the gradients, or the map of the mask's tiles: as it is in float64, and as eager has it."""

    name: str
    exact: Tensor
    eager: Tensor

    @property
    def of_result(self) -> bool:
        return self.name in (_RESULT, _WEIGHTS)

    @property
    def eager_error(self) -> float:
        return (self.eager.double() - self.exact).nan_to_num().abs().amax().item() if self.exact.numel() else 0.0


@dataclass(frozen=True)
class _Asked:
    """A problem, the gradient of its result, and what the answers are, first the result.

    weights  of each matrix that is written beside it, its spec and number of heads
    """

    problem: Problem
    weights: tuple[tuple[AttentionSpec, int], ...]
    wanted: tuple[bool, ...]
    grad_out: Tensor
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Kernels:
    """What answers: gradients are not asked of ``backward`` where it is None, nor a map of ``tile_map``."""

    forward: Kernel
    backward: Backward | None = None
    tile_map: MapKernel | None = None
    weights: tuple[WeightsKernel, ...] = ()

    @staticmethod
    def of(asked: _Asked, target: str) -> _Kernels:
        spec, wanted = asked.problem.spec, asked.wanted
        use = map_used(spec)
        return _Kernels(
            targets.kernel(spec, target),
            targets.backward_kernel(spec, target, wanted) if any(wanted) else None,
            None if use is None else targets.map_kernel(use.tile_map, target),
            tuple(targets.weights_kernel(matrix, target) for matrix, _ in asked.weights),
        )


def _asked(p: Problem, wanted: tuple[bool, ...], matrices: Sequence[tuple[str, int]] = ()) -> _Asked:
    exact, eager = (reference.attention(p.spec, p.operands, p.sizes, precision) for precision in ("exact", "eager"))
    grad = torch.randn(eager.shape, generator=torch.Generator(eager.device).manual_seed(2), device=eager.device).to(eager.dtype)
    parts = [_Part(_RESULT, exact, eager)]
    if any(wanted):
        of = (reference.attention_backward(p.spec, grad, p.operands, p.sizes, wanted, how) for how in ("exact", "eager"))
        numbers = [i for i, w in enumerate(wanted) if w]
        parts += [_Part(f"the gradient of operand {i}", *both) for i, *both in zip(numbers, *of, strict=True)]
    weights = tuple((parsed(text), p.sizes[p.spec.batch - 1] if heads else 0) for text, heads in matrices)
    for matrix, heads in weights:
        both = (reference.weights(matrix, p.operands, p.sizes, heads, how) for how in ("exact", "eager"))
        parts.append(_Part(_WEIGHTS, *both))
    if (use := map_used(p.spec)) is not None:
        cells = p.operands[use.load.operand].double()
        parts.append(_Part(_MAP, cells, cells))
    return _Asked(p, weights, wanted, grad, tuple(parts))


class _FilledWithNaN(TorchDispatchMode):
    """Memory that is taken holds no numbers: what a kernel does not write could be what an answer before it has left there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "empty" in func.overloadpacket.__name__ and isinstance(made, Tensor):
            if made.is_floating_point():
                made.fill_(torch.nan)
            elif made.dtype == torch.uint8:  # a map; other integers may be places in memory
                made.fill_(255)
        return made


def _answers(asked: _Asked, kernels: _Kernels) -> list[Tensor]:
    """The kernels' results, in the order of the parts."""
    p, use = asked.problem, map_used(asked.problem.spec)
    with _FilledWithNaN():  # type: ignore[no-untyped-call]
        if kernels.backward is not None or kernels.weights:
            out, lse = kernels.forward.forward(p.operands, p.sizes)
            found = [out]
            if kernels.backward is not None:
                found += kernels.backward(asked.grad_out, p.operands, p.sizes, out, lse)
            for kernel, (_, heads) in zip(kernels.weights, asked.weights, strict=True):
                found.append(kernel(p.operands, lse, p.sizes, heads))
        else:
            found = [kernels.forward(p.operands, p.sizes)]
        if use is not None and kernels.tile_map is not None:
            found.append(kernels.tile_map(*of_map(use, p.spec, p.operands, p.sizes)).double())
    return found


def _compared(part: _Part, found: Tensor, allowed: float, size: float) -> Finding:
    """NaN where it should not be, or none where it should, is an infinite error.

    size  of what gradients are sums of, which may cancel: a few roundings of it are no error
    """
    if found.numel() == 0:
        return Finding(part.name, 0.0, 0.0, 0.0)
    error = (found.double() - part.exact).nan_to_num().abs()
    error = error.masked_fill(misplaced_nan(found, part.exact, part.eager), torch.inf)
    at = torch.unravel_index(error.argmax(), error.shape)
    size = max(size, part.exact.nan_to_num().abs().amax().item())
    allowed += _ROUNDINGS * torch.finfo(found.dtype).eps * size
    return Finding(part.name, error.amax().item(), part.eager_error, allowed, tuple(int(i) for i in at))


def misplaced_nan(found: Tensor, exact: Tensor, eager: Tensor) -> Tensor:
    """Where ``found`` is NaN and eager is not, or is not where both eager and float64 are.

    Eager may have more: with AMX, torch's products in bfloat16 let NaN of a row into the row before, where the number of their
    terms, such as keys, is odd, and at many beyond 32 (torch 2.13).
    """
    return found.isnan() & ~eager.isnan() | ~found.isnan() & eager.isnan() & exact.isnan()
