"""Launches Triton kernels through Triton's own launcher, on the driver of fake_cuda.c, and prints as JSON what reached that.

LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH are the folder of its libcuda.so.1.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from decode_specs import DECODING
from gradients import floats, grad_out
from specs import CASES, RANDOM_CASES
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fuse.kernel import sharing
from fuse.targets.triton import copies, plan_decode
from fuse.targets.triton.function import Function
from fuse.targets.triton.launch import TritonKernel
from fuse.targets.triton.launch_backward import TritonBackward

NAMES = ("window", "grouped_query", "documents_in_any_order", "relative_table", "dropout_causal_two_tiles")
FAKE = ctypes.CDLL("libcuda.so.1")
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch._C._cuda_getCurrentRawStream = lambda device: 0
wrong: list[str] = []
launch = Function._launch


def number(name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(FAKE, name)


def expected(function: Any, arguments: Sequence[Any]) -> list[int | None]:
    """Parameters of a kernel: what Triton makes no constant of. A descriptor has a map, sizes and strides; None: a map."""
    found: list[int | None] = []
    for argument, parameter in zip(arguments, function.params, strict=False):
        if isinstance(argument, TensorDescriptor):
            found += [None, *argument.shape, *argument.strides]
        elif isinstance(argument, Tensor):
            found.append(argument.data_ptr())
        elif argument != 1 or parameter.do_not_specialize:
            found.append(argument)
    return found


def checked(self: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
    """Launches, and compares what the driver was given."""
    before, want = number("launches").value, expected(self._function, arguments)
    number("wanted").value = len(want)
    launch(self, grid, arguments, constants)
    got = (ctypes.c_uint64 * 1024).in_dll(FAKE, "parameters")
    bits = [64 if n is None or not -(2**31) <= n < 2**31 else 32 for n in want]
    same = [n is None or got[i] % 2 ** bits[i] == n % 2 ** bits[i] for i, n in enumerate(want)]
    blocks, threads = (ctypes.c_uint * 3).in_dll(FAKE, "last_grid"), ctypes.c_uint.in_dll(FAKE, "last_threads")
    same += [tuple(blocks) == (*grid, 1, 1)[:3], threads.value == 32 * constants["num_warps"]]
    if number("launches").value != before + 1 or not all(same):
        wrong.append(f"{self._function.__name__} {grid}")


def main() -> None:
    driver.set_active(CudaDriver())
    Function._launch = checked  # type: ignore[method-assign]
    copies.WORTH = 0
    for name in NAMES:
        made = (CASES | RANDOM_CASES | DECODING)[name]("bfloat16")
        kernel, backward = TritonKernel(made.spec), TritonBackward(made.spec, floats(made))
        few = plan_decode.packed(sharing.runs(made.spec), made.sizes, 3)
        for _ in range(2):  # by what Triton compiled, and by what is remembered
            out, lse = kernel.forward(made.operands, made.sizes)
            kernel.launch(made.operands, made.sizes, None, few)
            backward(grad_out(made), made.operands, made.sizes, out, lse)
    facts = {name: number(name).value for name in ("launches", "maps", "refused")}
    print(json.dumps({**facts, "wrong": wrong}))


if __name__ == "__main__":
    main()
