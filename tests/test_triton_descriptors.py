"""Tiles that are copied by tensor descriptors, in Triton's interpreter: the same results, and only where layouts allow it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradients
import pytest
import torch
from problems import B0, B1, D, K, Problem, Q, load, op, problem, rand
from specs import CASES
from torch import Tensor

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fuse.ir.spec import Operand  # noqa: E402
from fuse.kernel.rectangles import describable, rows_of  # noqa: E402
from fuse.targets.triton import copies, function  # noqa: E402
from fuse.targets.triton.copies import descriptor  # noqa: E402
from fuse.targets.triton.launch import TritonKernel  # noqa: E402
from fuse.targets.triton.launch_backward import TritonBackward  # noqa: E402
from fuse.targets.triton.plan import ARCHITECTURES  # noqa: E402

COPIED = (
    "plain", "head_dim_24", "grouped_query", "packed_qkv", "causal_long", "window", "documents_in_any_order", "mapped_bool",
    "relative_table", "soft_cap_causal", "left_padding_and_causal", "masked_rows_lowest_fill",
)  # fmt: skip
Launches = list[tuple[str, bool]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The device is one with descriptors; (function, whether it was given any) of each launch that could have been."""
    found: Launches = []
    real = function.Function._launch

    def launch(self: Any, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
        if "DESCRIBED" in constants:
            name = self._function.fn.__name__.removeprefix("fuse_attention").strip("_")
            found.append((name, any(isinstance(a, TensorDescriptor) for a in arguments)))
        real(self, grid, arguments, constants)

    for module in ("launch", "module", "launch_backward"):
        monkeypatch.setattr(f"fuse.targets.triton.{module}.current_architecture", lambda: ARCHITECTURES["sm_90"])
    monkeypatch.setattr(function.Function, "_launch", launch)
    yield found


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of any size are."""
    monkeypatch.setattr(copies, "WORTH", 0)


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", COPIED)
def test_kernel_is_within_twice_the_error_of_eager(name: str, dtype: str, launches: Launches, worth_it: None) -> None:
    made = CASES[name](dtype)
    made.check(TritonKernel(made.spec)(made.operands, made.sizes))
    assert launches == [("", True)]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("name", ["causal_long", "grouped_query", "documents_in_any_order"])
def test_gradients_are_within_twice_the_error_of_eager(name: str, launches: Launches, worth_it: None) -> None:
    made = CASES[name]("bfloat16")
    wanted = gradients.floats(made)
    gradients.check(made, gradients.run(made, TritonBackward(made.spec, wanted)), wanted)
    assert launches == [("queries", True)]


def test_heads_that_lie_side_by_side_in_a_row_are_copied(launches: Launches, worth_it: None) -> None:
    """As GPT-2's queries are, a part of one product: query[q, d + 16 b1]."""
    made = problem("bfloat16", batch=(1, 3))
    rows = rand(37, 80, dtype="bfloat16")
    query = load(rows, 0, Q, op("add", D, op("mul", B1, 16)))
    spec = replace(made.spec, query=query, operands=(Operand(2, "bfloat16"), *made.spec.operands[1:]))
    packed = Problem(spec, [rows, *made.operands[1:]], made.sizes)
    packed.check(TritonKernel(spec)(packed.operands, packed.sizes))
    assert launches == [("", True)]


def test_a_call_that_is_too_short_takes_none(launches: Launches) -> None:
    made = problem("bfloat16")
    made.check(TritonKernel(made.spec)(made.operands, made.sizes))
    assert launches == [("", False)]


def test_an_operand_that_cannot_be_copied_is_loaded_with_all_others(launches: Launches, worth_it: None) -> None:
    made = problem("bfloat16")
    query = made.operands[0]
    made.operands[0] = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape).copy_(query)
    made.check(TritonKernel(made.spec)(made.operands, made.sizes))
    assert launches == [("", False)]


TENSOR = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "copied"),
    [
        (TENSOR, True),
        (TENSOR.transpose(1, 2).contiguous().transpose(1, 2), True),
        (TENSOR[:1, :1].as_strided((1, 1, 40, 64), (1, 1, 64, 1)), True),  # steps that nothing takes
        (TENSOR.mT.contiguous().mT, False),  # features are no neighbours
        (TENSOR[..., 1:], False),  # begins between multiples of 16 bytes
        (TENSOR.as_strided((2, 3, 40, 60), (7200, 2400, 60, 1)), False),  # so do its rows
        (TENSOR[:, :1].expand(2, 3, 40, 64), False),  # steps of nothing
    ],
)
def test_descriptors_need_a_layout(tensor: Tensor, copied: bool) -> None:
    found = descriptor(tensor, load(tensor, 0, B0, B1, K, D), 40, tensor.shape[-1], 16)
    assert (found is not None) == copied


def test_rows_and_features_come_last_wherever_they_are_in_the_tensor() -> None:
    stored = TENSOR.permute(3, 0, 2, 1)  # features, batch, keys, heads
    rows = rows_of(load(stored, 0, D, B0, K, B1))
    assert rows is not None and rows.dims == (1, 3, 2, 0)
    found = descriptor(stored, load(stored, 0, D, B0, K, B1), 33, 64, 16)
    assert found is not None and (found.shape, found.block_shape) == ([2, 3, 33, 64], [1, 1, 16, 64])
    assert found.strides == [3 * 40 * 64, 40 * 64, 64, 1]


def test_only_rectangles_of_16_bits_are_copied() -> None:
    assert rows_of(load(TENSOR, 0, B0, B1, op("add", K, 1), D)) is None
    assert rows_of(load(TENSOR[0], 0, B0, K, op("add", D, op("mul", B1, 20)))) is None  # heads of 40 bytes
    assert rows_of(load(TENSOR, 0, B0, K, K, D)) is None
    assert rows_of(load(TENSOR[None, None], 0, B0, B0, B0, B1, K, D)) is None  # too many dimensions
    assert describable(CASES["plain"]("bfloat16").spec) and not describable(CASES["plain"]("float32").spec)
