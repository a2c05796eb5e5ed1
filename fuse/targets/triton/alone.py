"""A kernel's file run by itself: ``python attention_….py`` on random tensors, as C++ kernels run alone."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.kernel.example import ExampleTensor, example
from fuse.targets.triton.launch import TritonKernel
from fuse.targets.triton.launch_backward import TritonBackward
from fuse.targets.triton.module import Module, load_module

_TIMES = 11
# Positions and heads where Triton's interpreter runs.
_SMALL = 40, 2


def run(file: str) -> None:
    """Prints the median time of the kernels in ``file``, and a checksum of what they give."""
    argparse.ArgumentParser(description="Runs a kernel on random tensors; prints its median time and a checksum.").parse_args()
    path, lines = Path(file), _header(Path(file))
    spec = AttentionSpec.from_json(lines["spec"])
    made, device = (example(spec), "cuda") if torch.cuda.is_available() else (example(spec, *_SMALL), "cpu")
    operands, module = [_random(t, device) for t in made.operands], Module(path, load_module(path))
    if "wanted" in lines:
        backward = TritonBackward(spec, json.loads(lines["wanted"]), module)
        out = _random(made.out, device)
        lse = torch.zeros(spec.lse_shape(made.sizes), dtype=getattr(torch, spec.lse_dtype), device=device)
        _report(lambda: backward(out, operands, made.sizes, out, lse))
    else:
        kernel = TritonKernel(spec, module)
        _report(lambda: [kernel.launch(operands, made.sizes, None, None)])


def _header(path: Path) -> dict[str, str]:
    """What the comment at the top says, by the first word of its lines."""
    top = (line[2:] for line in path.read_text().splitlines() if line.startswith("# "))
    return {word: rest.strip() for word, _, rest in (line.partition(" ") for line in top)}


def _random(t: ExampleTensor, device: str) -> Tensor:
    dtype: torch.dtype = getattr(torch, t.dtype)
    shape = [t.shape[dim] for dim in t.order]
    made = torch.randn(shape, device=device).to(dtype) if t.is_float else torch.ones(shape, dtype=dtype, device=device)
    return made.permute([t.order.index(dim) for dim in range(len(t.order))])


def _report(call: Callable[[], list[Tensor]]) -> None:
    results, times = call(), []  # the first call compiles
    for _ in range(_TIMES if torch.cuda.is_available() else 1):
        _wait()
        start = time.perf_counter()
        results = call()
        _wait()
        times.append(time.perf_counter() - start)
    total = sum(t.double().sum().item() for t in results)
    print(f"{statistics.median(times) * 1e3:.3f} ms, sum {total:.6g}")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
