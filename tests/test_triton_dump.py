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
from fuse.ir.tile_map import map_of  # noqa: E402
from fuse.targets import dump_index, reference  # noqa: E402
from fuse.targets.dump_index import Call, Layout  # noqa: E402

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


def alone(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A user has a GPU; here the interpreter runs it, mended as in all tests."""
    program = f"import triton_interpreter, runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("kind", "part"), [("forward", "the result"), ("backward", "the gradient of operand 2")])
def test_a_dumped_kernel_runs_alone(dump: Path, kind: str, part: str) -> None:
    if kind == "forward":
        file = the_file(dump)
    else:
        targets.backward_kernel(MADE.spec, "triton", floats(MADE))
        (file,) = dump.glob("attention_backward_*.py")
    done = alone(file)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"error \S+ of {part} where eager has \S+, at \[", done.stdout) and " ms, " in done.stdout


def test_a_wrong_edit_that_runs_alone_says_so(dump: Path) -> None:
    file = the_file(dump)
    file.write_text(file.read_text().replace("factor = scale / l", "factor = 2 * scale / l"))
    done = alone(file, "--no-times")
    assert done.returncode == 1 and "WRONG" in done.stdout and " ms" not in done.stdout, done.stderr


def test_it_has_help(dump: Path) -> None:
    done = alone(the_file(dump), "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and "--threads" in done.stdout


def test_every_kernel_is_listed_be_it_of_results_gradients_or_few_queries(dump: Path) -> None:
    the_file(dump)
    targets.backward_kernel(MADE.spec, "triton", floats(MADE))
    made = CASES["mapped_bool"]("float32")
    made.check(targets.kernel(made.spec, "triton")(made.operands, made.sizes))
    use = map_of(made.spec)
    assert use is not None
    targets.map_kernel(use.tile_map, "triton")
    one = CASES["one_query"]("float32")
    one.check(targets.kernel(one.spec, "triton")(one.operands, one.sizes))
    names = {file.name for file in dump.glob("*.py")}
    kinds = {re.sub(r"-[0-9a-f]{12}\.py", "", name) for name in names}
    found = {f"attention_{part}float32_16x16" for part in ("", "backward_", "decode_")}
    assert kinds >= {*found, "masked_float32_16x16", "masked_tiles_float32_16x16", "tile_map"}
    index = (dump / "index.md").read_text()
    assert all(f"## [{name}]" in index for name in names)


def test_a_kernel_of_few_queries_runs_alone_in_a_call_that_has_few(dump: Path) -> None:
    one = CASES["one_query"]("float32")
    one.check(targets.kernel(one.spec, "triton")(one.operands, one.sizes))
    (file,) = dump.glob("attention_decode_*.py")
    done = subprocess.run([sys.executable, "-m", "fuse.alone", file], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "it computes calls of few queries" in done.stderr
    layouts = tuple(Layout("float32", tuple(t.shape), t.stride()) for t in one.operands)
    dump_index.remember(dump, [Call(one.spec.to_json(), (), "cuda", tuple(one.sizes), layouts)])
    done = subprocess.run([sys.executable, "-m", "fuse.alone", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "q_len = 1, kv_len = 130" in done.stdout, done.stderr
