"""Whether kernels on a device are right: every named problem of the tests against float64, as the tests ask it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import gradients
from decode_specs import DECODING
from problems import Problem
from specs import CASES, RANDOM_CASES
from torch.utils import _pytree as pytree

from fuse.kernel.destinations import Unsupported

DTYPES = ("bfloat16", "float32", "float16")
ONLY = {"backward": DTYPES[:2], "few queries": DTYPES[:2], "log-sum-exp": DTYPES[:1]}
COPIED = DTYPES[0]
PARTS = 3  # of the keys, in the route of few queries


def every(device: str) -> list[tuple[str, str, str]]:
    """Route, name and dtype of every check; those of the first dtype come first."""
    named = (*CASES, *RANDOM_CASES)
    routes = {"forward": named, "backward": named, "log-sum-exp": tuple(CASES)}
    if device == "cuda":
        routes["few queries"] = (*DECODING, *CASES)
    found = [(route, name, dtype) for dtype in DTYPES for route, names in routes.items() for name in names]
    return [c for c in found if c[2] in ONLY.get(c[0], DTYPES)]


def check(route: str, name: str, dtype: str, device: str) -> str:
    """The kernel that was right. Raises AssertionError where the result is not as close to float64 as eager's."""
    problem: Problem = (CASES | RANDOM_CASES | DECODING)[name](dtype)
    if device != "cpu":
        from fuse.targets.triton import copies

        # These calls are short. In one dtype they copy tiles by tensor descriptors all the same, in the others they load them.
        copies.WORTH = 0 if dtype == COPIED else 2**62
    if route == "backward":
        return _check_backward(problem, device)
    kernel = _kernel(problem, device)
    operands = [t.to(device) for t in problem.operands]
    if route == "few queries":
        from fuse.kernel import sharing
        from fuse.targets.triton import plan_decode

        packed = plan_decode.packed(sharing.runs(problem.spec), problem.sizes, PARTS)
        problem.check(kernel.launch(operands, problem.sizes, None, packed).cpu())
    elif route == "log-sum-exp":
        _check_with_lse(problem, *(t.cpu() for t in kernel.forward(operands, problem.sizes)))
    else:
        problem.check(kernel(operands, problem.sizes).cpu())
    return type(kernel).__name__


def _kernel(problem: Problem, device: str) -> Any:
    """Not by runtime.kernel, which falls back to the reference without failing."""
    if device == "cpu":
        from fuse.targets.cpp.launch import CppKernel, build

        return CppKernel(problem.spec, build(problem.spec))
    from fuse.targets.triton.launch import TritonKernel

    return TritonKernel(problem.spec)


def _check_with_lse(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    from fuse.targets import reference

    problem.check(out)
    expected = reference.attention_with_lse(problem.spec, problem.operands, problem.sizes, "eager")[1]
    torch.testing.assert_close(lse, expected.to(lse.dtype), rtol=2e-2, atol=2e-2, equal_nan=True)


def _check_backward(problem: Problem, device: str) -> str:
    wanted = gradients.floats(problem)
    backward: Any
    try:
        if device == "cpu":
            from fuse.targets.cpp.launch_backward import CppBackward, build_backward

            backward = CppBackward(problem.spec, wanted, build_backward(problem.spec, wanted))
        else:
            from fuse.targets.triton.launch_backward import TritonBackward

            backward = TritonBackward(problem.spec, wanted)
    except Unsupported as error:  # which the reference then computes
        return f"no kernel: {error}"

    def there_and_back(*call: Any) -> list[torch.Tensor]:
        return [x.cpu() for x in backward(*pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), call))]

    gradients.check(problem, gradients.run(problem, there_and_back), wanted)
    return type(backward).__name__
