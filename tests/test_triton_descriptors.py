"""Tiles that are copied by tensor descriptors, in Triton's interpreter: the same results, and only where layouts allow it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from specs import CASES

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fuse.planner_triton import ARCHITECTURES  # noqa: E402
from fuse.runtime import triton_descriptors, triton_launch  # noqa: E402
from fuse.runtime.triton import TritonKernel  # noqa: E402

COPIED = (
    "plain", "head_dim_24", "grouped_query", "causal_long", "window", "documents_in_any_order", "mapped_bool", "relative_table",
    "soft_cap_causal", "left_padding_and_causal", "masked_rows_lowest_fill", "value_narrower_than_key",
)  # fmt: skip


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Kernels are those of a GPU with descriptors, and calls of any size are worth them; whether each launch took some."""
    launches: list[bool] = []
    real = triton_launch.Function._launch

    def launch(self: Any, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
        if "DESCRIBED" in constants:
            launches.append(any(isinstance(a, TensorDescriptor) for a in arguments))
        real(self, grid, arguments, constants)

    for module in ("triton", "triton_module"):
        monkeypatch.setattr(f"fuse.runtime.{module}.current_architecture", lambda: ARCHITECTURES["sm_90"])
    monkeypatch.setattr(triton_descriptors, "WORTH", 0)
    monkeypatch.setattr(triton_launch.Function, "_launch", launch)
    yield launches


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", COPIED)
def test_kernel_is_as_close_to_float64_as_eager(name: str, dtype: str, described: list[bool]) -> None:
    made = CASES[name](dtype)
    made.check(TritonKernel(made.spec)(made.operands, made.sizes))
    assert described == [True]
