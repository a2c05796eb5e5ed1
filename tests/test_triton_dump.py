"""FUSE_DUMP of Triton's kernels: files that run alone, and an edited one runs in the kernel's place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import floats
from specs import CASES

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse import targets  # noqa: E402
from fuse.targets import reference  # noqa: E402

MADE = CASES["plain"]("float32")


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSE_DUMP", str(tmp_path / "dump"))
    targets.reset()
    return tmp_path / "dump"


def the_file(dump: Path) -> Path:
    targets.reset()
    kernel = targets.kernel(MADE.spec, "triton")
    MADE.check(kernel(MADE.operands, MADE.sizes))
    return next(dump.glob("attention_float32*.py"))


def test_an_edited_kernel_runs_in_the_place_of_the_rendered_one(dump: Path) -> None:
    file = the_file(dump)
    file.write_text(file.read_text().replace("factor = scale / l", "factor = 2 * scale / l"))
    targets.reset()
    kernel = targets.kernel(MADE.spec, "triton")
    assert str(kernel.runs) == f"edited kernel {file}"
    expected = reference.attention(MADE.spec, MADE.operands, MADE.sizes, "eager")
    torch.testing.assert_close(kernel(MADE.operands, MADE.sizes), 2 * expected)


@pytest.mark.parametrize("broken", ["def half(", "nothing = 1\n"])
def test_a_broken_edit_is_told_and_the_reference_runs(dump: Path, broken: str) -> None:
    the_file(dump).write_text(broken)
    targets.reset()
    with pytest.warns(RuntimeWarning, match=r"attention_float32_.*\.py"):
        kernel = targets.kernel(MADE.spec, "triton")
    assert kernel.runs.by == "reference"
    MADE.check(kernel(MADE.operands, MADE.sizes))


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_dumped_kernel_runs_alone(dump: Path, kind: str) -> None:
    if kind == "forward":
        file = the_file(dump)
    else:
        targets.backward_kernel(MADE.spec, "triton", floats(MADE))
        (file,) = dump.glob("attention_backward_*.py")
    # A user has a GPU; here the interpreter runs it, mended as in all tests.
    alone = f"import triton_interpreter, runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", alone], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d+ ms, sum -?\d.*\n", done.stdout)
