"""The functions that score programs call on the Triton target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from operator_specs import KINDS, of_operators

from fuse.kernel.source import environment

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.targets.triton.launch import TritonKernel  # noqa: E402
from fuse.targets.triton.module import load_module  # noqa: E402

KERNEL = """
@triton.jit
def run(inputs, to, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(to + i, f_tanh_half(tl.load(inputs + i)))
"""
# "The maximum relative error over the entire floating point range is 2^-11" (PTX ISA, tanh).
PTX_ERROR = 2.0**-11


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
def test_tangent_without_the_instruction_is_better_than_with_it(tmp_path: Path) -> None:
    path = tmp_path / "functions.py"
    functions = environment().get_template("triton/functions.py.jinja").render()
    path.write_text(f"import triton\nimport triton.language as tl\n{functions}\n{KERNEL}")
    size = 2**17
    positive = np.append(np.logspace(-30, 4, size // 2 - 2), [2.0**-5, np.inf]).astype(np.float32)
    values = torch.from_numpy(np.concatenate((positive, -positive)))
    found = torch.empty(size)
    load_module(path).run[(1,)](values, found, size)
    exact = values.double().tanh()
    assert ((found - exact) / exact).abs().max() < PTX_ERROR / 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tangent_is_no_farther_than_the_rounding_that_it_replaces(dtype: torch.dtype) -> None:
    assert torch.finfo(dtype).eps / 2 >= PTX_ERROR


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("level", ["head", "entry"])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_are_those_of_pytorch(kind: str, level: str) -> None:
    """On numbers, and on blocks of them."""
    made = of_operators(kind, level)
    made.check(TritonKernel(made.spec)(made.operands, made.sizes))
