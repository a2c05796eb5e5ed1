"""Triton's modules in the cache: what is imported is what was rendered."""

from __future__ import annotations

import importlib.util
import marshal
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gradients import check, floats, run
from specs import CASES

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse import targets  # noqa: E402
from fuse.targets.triton.module import load_module  # noqa: E402

MADE = CASES["documents"]("float32")  # forward, gradients, and their lists of tiles


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    targets.reset()
    yield tmp_path / "triton"
    targets.reset()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "another module": lambda path: path.write_text("raise SystemExit('imported')\n"),
    "a folder": a_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_module_is_written_again_and_never_imported(folder: Path, damage: str) -> None:
    def kernels() -> tuple[targets.Kernel, targets.Backward]:
        targets.reset()
        return targets.kernel(MADE.spec, "triton"), targets.backward_kernel(MADE.spec, "triton", floats(MADE))

    kernels()
    sources = {path: path.read_text() for path in folder.glob("*.py")}
    assert len(sources) == 4
    for path in sources:
        DAMAGES[damage](path)
    kernel, backward = kernels()
    assert kernel.runs.by == backward.runs.by == "kernel"
    MADE.check(kernel(MADE.operands, MADE.sizes))
    check(MADE, run(MADE, backward), floats(MADE))
    assert {path: path.read_text() for path in folder.glob("*.py")} == sources


def test_bytecode_is_neither_taken_nor_left(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("found = 'source'\n")
    facts = source.stat()
    bytecode = Path(importlib.util.cache_from_source(str(source)))
    bytecode.parent.mkdir()
    header = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, int(facts.st_mtime), facts.st_size)
    bytecode.write_bytes(header + marshal.dumps(compile("found = 'bytecode'", str(source), "exec")))
    assert load_module(source).found == "source"
    bytecode.unlink()
    load_module(source)
    assert not bytecode.exists()


def test_a_kernel_that_cannot_be_kept_when_it_is_needed_first_is_left_to_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That for few queries is made by the first call that has few."""
    made = CASES["one_query"]("float32")
    kernel = targets.kernel(made.spec, "triton")
    folder.with_name("file").touch()
    monkeypatch.setenv("FUSE_CACHE_DIR", str(folder.with_name("file") / "below"))
    with pytest.warns(RuntimeWarning, match="set FUSE_CACHE_DIR"):
        made.check(kernel(made.operands, made.sizes))
    assert kernel.runs.by == "reference" and "FUSE_CACHE_DIR" in kernel.runs.why
