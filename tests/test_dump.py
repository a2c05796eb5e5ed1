"""FUSE_DUMP through torch.compile: what is read there is what runs. tests/test_runtime.py runs such files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fuse
from fuse import targets

pytestmark = pytest.mark.compiler


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Compiles and checks an attention as a new process would; returns the one file that was dumped."""
    monkeypatch.setenv("FUSE_DUMP", str(tmp_path / "dump"))

    def body() -> Path:
        targets.reset()
        torch.compiler.reset()
        x = torch.randn(2, 64, 16)
        with torch.no_grad():
            got = torch.compile(attention, backend="fuse", options={"inner": "eager"})(x, x, x)
        torch.testing.assert_close(got, attention(x, x, x))
        (file,) = (tmp_path / "dump").iterdir()
        return file

    return body


def test_a_dumped_kernel_is_the_one_that_runs(run: Callable[[], Path]) -> None:
    file = run()
    (site,) = fuse.report().sites
    assert site.kernels["cpp"].read_text() == file.read_text()
    assert "score * 0.25" in file.read_text()


def test_an_edited_kernel_is_used_in_its_place(run: Callable[[], Path]) -> None:
    file = run()
    edited = "// mine\n" + file.read_text()
    file.write_text(edited)
    assert run() == file
    assert fuse.report().sites[-1].kernels["cpp"].read_text() == edited


def test_a_broken_edit_is_told_and_the_model_still_runs(run: Callable[[], Path]) -> None:
    run().write_text("#error half finished\n")
    with pytest.warns(RuntimeWarning, match="half finished"):
        run()
