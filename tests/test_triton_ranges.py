"""Interval arithmetic of Triton kernels is sound, and as sharp as it should be: the cases of the shared suite for integers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from interval_cases import INTEGERS, NAMES, Case, check, written

from fuse.ir.interval import Range
from fuse.kernel.source import environment

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.targets.triton.module import load_module  # noqa: E402
from fuse.targets.triton.ranges import TritonRanges  # noqa: E402
from fuse.targets.triton.write import Block, TritonWriter  # noqa: E402

LIMIT = 2**60  # an end that far away stands for none
KERNEL = """
@triton.jit
def run(inputs, to, M, N: tl.constexpr):
    i = tl.arange(0, N)
    {operands}
    {lines}
    tl.store(to + i, tl.cast({result}[0], tl.int64), i < M)
    tl.store(to + M + i, tl.cast({result}[1], tl.int64), i < M)
"""


def source(case: Case) -> str:
    block = Block()
    writer = TritonRanges(TritonWriter(lambda _: block, "tl.float32", [0]), "q", block, block, [0])
    result = written(writer, case)
    operands = [_operand(i, name, dtype) for i, (name, dtype) in enumerate(zip(NAMES, case.sources, strict=False))]
    kernel = KERNEL.format(operands="\n    ".join(operands), lines="\n    ".join(block.lines), result=result)
    parts = ["triton/functions.py.jinja", "triton/ranges.py.jinja"]
    text = "\n\n".join(environment().get_template(part).render() for part in parts)
    return f"import triton\nimport triton.language as tl\n{text}\n{kernel}"


def _operand(place: int, name: str, dtype: str) -> str:
    first, second = (f"tl.load(inputs + {2 * place + end} * M + i, i < M)" for end in (0, 1))
    return f"{name} = {second} != 0, {first} != 0" if dtype == "bool" else f"{name} = {first}, {second}"


def _ends(r: Range) -> list[torch.Tensor]:
    """Those that a kernel knows: a range that lies beyond the limit can be anywhere."""
    beyond = (r.low >= LIMIT) | (r.high <= -LIMIT)
    return [torch.where(beyond, -LIMIT, r.low.clamp(min=-LIMIT)), torch.where(beyond, LIMIT, r.high.clamp(max=LIMIT))]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("case", INTEGERS, ids=str)
def test_triton_ranges_hold_all_values(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "ranges.py"
    path.write_text(source(case))
    module = load_module(path)

    def run(_: Case, args: Sequence[Range]) -> Range:
        inputs = torch.stack([end for r in args for end in _ends(r)])
        count = inputs.shape[1]
        to = torch.zeros(2, count, dtype=torch.int64)
        module.run[(1,)](inputs, to, count, 1 << (count - 1).bit_length())
        if case.dtype == "bool":  # whether it can comes before whether it must
            return Range(to[1], to[0], torch.zeros(count, dtype=torch.bool))
        low, high = torch.where(to[0] <= -LIMIT, -(2**63), to[0]), torch.where(to[1] >= LIMIT, 2**63 - 1, to[1])
        return Range(low, high, torch.zeros(count, dtype=torch.bool))

    check(case, run)
