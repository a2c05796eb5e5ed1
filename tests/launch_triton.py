"""Launches Triton kernels on a GPU that is not there, and prints as JSON what came of it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from cProfile import Profile
from dataclasses import replace
from itertools import pairwise
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # as from Triton 3.10 on

import torch
import triton
from problems import Problem, problem
from stub_driver import StubDriver, launched, with_driver
from torch import Tensor
from torch.fx import GraphModule
from triton.runtime import JITFunction

from fuse import backend, targets
from fuse.ops.warm import ExpectedCall
from fuse.qualify import right
from fuse.targets import reference, registry
from fuse.targets.triton import copies
from fuse.targets.triton.launch import TritonKernel
from fuse.targets.triton.plan import ARCHITECTURES, candidates
from fuse.targets.triton.target import TritonTarget

SPILLS = {"none": [0], "two": [13, 85, 0], "all": [85, 13, 4], "more and more": [4, 13, 85]}
LONG = problem("bfloat16", batch=(1, 1), q_len=1024, qk_dim=64)
MADE = problem("bfloat16", batch=(1, 2), q_len=64, qk_dim=32)


def misaligned(made: Problem) -> Problem:
    """With a query that begins 2 bytes behind a multiple of 16."""
    query = made.operands[0]
    other = torch.zeros(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    return replace(made, operands=[other, *made.operands[1:]])


def counted(driver: StubDriver, kernel: TritonKernel, made: Problem) -> tuple[int, int]:
    """Kernels that a call compiles, and launches that it makes."""
    before = driver.launches
    kernel(made.operands, made.sizes)
    return len(launched()), driver.launches - before


def beforehand(driver: StubDriver, compilations: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(kernels that are compiled, launches) by the backend for a model of two attentions, then by a step of training."""
    counts = [(len(compilations), driver.launches)]
    begun: list[Future[None]] = []
    beside = targets.beside
    targets.beside = lambda *work: begun.append(beside(*work)) or begun[-1]
    registry.register(replace(TritonTarget(), devices=frozenset({"cpu"})))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(2):
            q = (q @ k.mT * 0.125).softmax(-1) @ v
        return q

    def compiler(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = backend.fuse(gm, inputs, options={"target": "triton", "inner": "aot_eager"})
        for future in begun:
            future.result()
        counts.append((len(compilations), driver.launches))
        return compiled

    inputs = [torch.randn(1, 2, 64, 64).bfloat16().requires_grad_() for _ in range(3)]
    torch.compile(model, backend=compiler)(*inputs).backward(torch.randn(1, 2, 64, 64).bfloat16())
    counts.append((len(compilations), driver.launches))
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counts)]


def on_a_small_device() -> list[int]:
    """Shared memory of the kernels that two calls load, where the planner takes the device for larger than it is."""
    launched()
    driver = with_driver("sm_80")
    driver.get_device_properties = lambda device: {"max_shared_mem": 24 * 1024}
    made = problem("bfloat16", batch=(1, 2), q_len=64, qk_dim=64)
    kernel = TritonKernel(made.spec)
    for _ in range(2):
        kernel(made.operands, made.sizes)
    return [json.loads(files["json"].read_text())["shared"] for files in launched()]


def spilling(counts: Sequence[int]) -> list[Any]:
    """(kernels that are loaded, rows of a program that is launched) by two calls; ``counts``: what loaded kernels spill."""
    driver, left = with_driver("sm_86"), iter(counts)
    driver.spills = lambda binary: next(left)
    kernel, found = TritonKernel(LONG.spec), []
    launched()
    for _ in range(2):
        kernel(LONG.operands, LONG.sizes)
        found.append((len(launched()), 1024 // driver.programs[-1]))
    return found


def unlaunched() -> list[str]:
    """What qualification finds of kernels that a device does not run."""
    made = problem("float32", batch=(1, 2), q_len=40, qk_dim=16)
    metas = tuple(t.to("meta") for t in made.operands)
    call = ExpectedCall(made.spec.to_json(), "triton", metas, tuple(made.sizes), torch.device("cpu"))
    return [str(finding) for finding in right.findings(call, (True, True, True)) if finding.wrong]


def refused() -> list[Any]:
    """(whether results and gradients are those of the reference, warnings) where Triton compiles nothing."""
    made = problem("bfloat16", batch=(1, 2), q_len=40, qk_dim=16)
    wanted = (True, True, True)
    exact = reference.attention(made.spec, made.operands, made.sizes, "eager")
    warmup = JITFunction.warmup

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    JITFunction.warmup = fail
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = targets.kernel(made.spec, "triton")(made.operands, made.sizes)
        again, lse = targets.kernel(made.spec, "triton").forward(made.operands, made.sizes)
        grads = targets.backward_kernel(made.spec, "triton", wanted)(out, made.operands, made.sizes, out, lse)
    JITFunction.warmup = warmup
    expected = reference.attention_backward(made.spec, out, made.operands, made.sizes, wanted, "eager")
    same = [torch.equal(a, b) for a, b in zip((out, again, *grads), (exact, exact, *expected), strict=True)]
    return [all(same), [str(w.message) for w in caught]]


def main() -> None:
    found: dict[str, Any] = {}
    compilations: list[dict[str, Any]] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **facts: compilations.append(facts)
    driver = with_driver("sm_90")
    kernel = TritonKernel(MADE.spec)
    found["first"] = counted(driver, kernel, MADE)
    found["again"] = counted(driver, kernel, MADE)
    found["other size"] = counted(driver, kernel, problem("bfloat16", batch=(1, 2), q_len=80, qk_dim=32))
    found["misaligned"] = counted(driver, kernel, misaligned(MADE))
    with Profile() as profile:
        for _ in range(20):
            kernel(MADE.operands, MADE.sizes)
    found["calls"] = sum(entry.callcount for entry in profile.getstats()) / 20
    for kind, copies.WORTH in (("loaded", 2**24), ("copied", 0)):
        made = problem("bfloat16", batch=(1, 2), q_len=64, qk_dim=48)
        warmed = TritonKernel(made.spec)
        for device in ("meta", "cpu"):
            before = (len(compilations), driver.launches)
            warmed([t.to(device) for t in made.operands], made.sizes)
            found[f"{kind}, {device}"] = (len(compilations) - before[0], driver.launches - before[1])
    found["shared"] = on_a_small_device()
    found["plans"] = [plan.block_q for plan in candidates(LONG.spec, ARCHITECTURES["sm_86"])]
    found["spilling"] = {name: spilling(counts) for name, counts in SPILLS.items()}
    driver = with_driver("sm_90")
    found["compiled beforehand"] = beforehand(driver, compilations)
    found["fused sums"] = sum(facts["compile"]["enable_fp_fusion"] for facts in compilations) / len(compilations)
    found["not launched"] = unlaunched()
    found["refused"] = refused()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
