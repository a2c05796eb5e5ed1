"""From a spec to a kernel that can be called, and what happens where none can be built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import problem
from specs import CASES

from fuse import targets
from fuse.ir.tile_map import map_of
from fuse.kernel.source import ENTRY
from fuse.targets import reference
from fuse.targets.cache import BuildFailed
from fuse.targets.cpp import compiler, launch, op, target
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import CppKernel, build_source
from fuse.targets.cpp.plan import backward_plan, plan, plan_tile_map
from fuse.targets.cpp.render import render
from fuse.targets.cpp.render_backward import render_backward
from fuse.targets.cpp.render_tile_map import render_tile_map
from fuse.targets.fallback import OrElse


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    targets.reset()
    yield
    targets.reset()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_without_compiler_one_warning_says_how_to_get_one_and_the_model_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    first, second = CASES["causal"]("float32"), CASES["plain"]("float32")
    with pytest.warns(RuntimeWarning, match="no C.. compiler was found.*apt install g") as caught:
        out = targets.kernel(first.spec, "cpp")(first.operands, first.sizes)
        targets.kernel(second.spec, "cpp")
    assert len(caught) == 1
    assert torch.equal(out, reference.attention(first.spec, first.operands, first.sizes, "eager"))


def test_a_kernel_that_fails_as_nobody_foresaw_gives_way_with_a_warning_and_is_not_tried_again() -> None:
    tried: list[int] = []
    fails: Any = lambda x: [tried.append(x), x / "2"]  # noqa: E731
    kernel: OrElse[[int], int] = OrElse(fails, lambda why: lambda x: x + 1, (BuildFailed,), "tile map")
    with pytest.warns(RuntimeWarning, match="a kernel failed, please report it: TypeError: unsupported operand") as told:
        assert [kernel(1), kernel(2)] == [2, 3]
    assert tried == [1] and len(told) == 1


def test_want_of_memory_is_raised_and_the_kernel_stays() -> None:
    def run(enough: bool) -> int:
        if not enough:
            raise torch.OutOfMemoryError
        return 1

    kernel: OrElse[[bool], int] = OrElse(run, lambda why: lambda _: 2, (BuildFailed,), "tile map")
    with pytest.raises(torch.OutOfMemoryError):
        kernel(False)
    assert kernel(True) == 1


def test_failed_build_warns_with_what_the_compiler_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = folder / "broken"
    broken.write_text("#!/bin/sh\necho unsupported >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(RuntimeWarning, match="unsupported"):
        assert targets.kernel(CASES["plain"]("float32").spec, "cpp").source is None


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CXX", 'g++ "', "CXX=g.. .* is no command"),
        ("FUSE_CACHE_DIR", __file__, "environment variable FUSE_CACHE_DIR=.*a folder"),
    ],
)
def test_what_a_user_can_correct_is_not_called_a_defect(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.warns(RuntimeWarning, match=says) as told:
        assert targets.kernel(CASES["plain"]("float32").spec, "cpp").runs.by == "reference"
    assert "please report" not in str(told[0].message)


def test_reference_target_builds_nothing(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert targets.kernel(CASES["plain"]("float32").spec, "reference").source is None


@pytest.mark.compiler
def test_identical_specs_build_once_and_a_warm_cache_builds_nothing(folder: Path) -> None:
    specs = [CASES[name]("float32").spec for name in ("plain", "plain", "causal")]
    op.load()  # what calls them is built once for a process
    before = targets.builds.count
    for spec in specs:
        targets.prepare(spec, "cpp")
    for spec in specs:
        targets.kernel(spec, "cpp")
    assert targets.builds.count == before + 2
    targets.reset()
    for spec in specs:
        targets.kernel(spec, "cpp")
    assert targets.builds.count == before + 2


EMPTY = f'extern "C" __attribute__((visibility("default"))) int {ENTRY}(const long*) {{ return 0; }}'


@pytest.mark.compiler
@pytest.mark.parametrize("other", ["time", "size", "place", "its flags", "flags of the instruction set", "machine", "source"])
def test_a_kernel_is_built_anew_for_whatever_its_binary_depends_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The compiler's time, size and place tell its version."""
    program, link, isa, source = folder / "compiler", folder / "link", instruction_set(), EMPTY
    program.write_text(f'#!/bin/sh\nexec {" ".join(compiler.cxx_compiler())} "$@"\n')
    program.chmod(0o755)
    shutil.copy2(program, folder / "copy")
    link.symlink_to(program)
    monkeypatch.setenv("CXX", str(link))
    first, before, time = build_source("kernel", isa, source), targets.builds.count, program.stat().st_mtime_ns
    assert build_source("kernel", isa, source).source == first.source and targets.builds.count == before
    if other == "time":
        os.utime(program, ns=(time, time + 1))
    elif other == "size":
        with program.open("a") as file:
            file.write("\n")
        os.utime(program, ns=(time, time))
    elif other == "place":
        link.unlink()
        link.symlink_to(folder / "copy")
    elif other == "its flags":
        monkeypatch.setenv("CXX", f"{link} -DOTHER")
    elif other == "flags of the instruction set":
        isa = "sse"
    elif other == "machine":
        monkeypatch.setattr(compiler, "processor", lambda: "another")
    else:
        source += "\n"
    assert build_source("kernel", isa, source).source != first.source and targets.builds.count == before + 1


@pytest.mark.compiler
def test_edited_dump_is_used_in_place_of_the_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_DUMP", str(folder / "dump"))
    made = CASES["plain"]("float32")
    targets.kernel(made.spec, "cpp")
    (dumped,) = (folder / "dump").glob("*.cpp")
    dumped.write_text(dumped.read_text().replace("out_scale / l[v];", "R(2) * out_scale / l[v];"))
    targets.reset()
    out = targets.kernel(made.spec, "cpp")(made.operands, made.sizes)
    torch.testing.assert_close(out, 2 * reference.attention(made.spec, made.operands, made.sizes, "eager"))


def sources() -> dict[str, tuple[str, Callable[[], str]]]:
    """What the first line says, and the source, of kernels of each kind."""

    def forward(name: str) -> str:
        spec = CASES[name]("float32").spec
        return render(spec, plan(spec, instruction_set()))

    def backward(name: str, dtype: str, terms: bool) -> str:
        made = CASES[name](dtype)
        chosen = backward_plan(made.spec, instruction_set(), terms)
        return render_backward(made.spec, [t.is_floating_point() for t in made.operands], chosen)

    def tile_map() -> str:
        use = map_of(CASES["mapped_bool"]("float32").spec)
        assert use is not None
        return render_tile_map(use.tile_map, plan_tile_map(use.tile_map, instruction_set()))

    return {
        **{name: ("out = sum over k of", partial(forward, name)) for name in ("causal", "padding", "relative_table")},
        "gradients in float32": ("gradients of query", partial(backward, "relative_table", "float32", True)),
        "gradients in bfloat16": ("gradients of query", partial(backward, "sinks", "bfloat16", False)),
        "tile map": ("which tiles hold", tile_map),
    }


@pytest.mark.compiler
@pytest.mark.parametrize("name", sources())
def test_source_says_what_it_is_and_runs_alone(name: str, tmp_path: Path) -> None:
    first, source = sources()[name]
    file, binary, text = tmp_path / "kernel.cpp", tmp_path / "kernel", source()
    file.write_text(text)
    assert text.startswith(f"// {first}")
    assert '"expr"' in text and "torch-fuse" in text
    said = "// without Python: "
    command = next(line for line in text.splitlines() if line.startswith(said)).removeprefix(said)
    build = command.partition(" && ")[0].replace("<this file>", str(file)).replace("-o kernel", f"-o {binary}")
    subprocess.run(build.replace("c++ ", "g++ "), shell=True, check=True)
    printed = subprocess.run([binary, "1"], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"B0 = \d+, .*kv_len = \d+.*, threads = 1: \d+\.\d+ ms, sum of the result -?\d.*\n", printed), printed
    for arguments, status in ((["--help"], 0), (["many"], 1), (["0"], 1), (["1", "2"], 1)):
        done = subprocess.run([binary, *arguments], capture_output=True, text=True)
        assert done.returncode == status and done.stdout.startswith(f"usage: {binary} [threads]\n")
        assert f"    {printed.partition(', threads')[0]}\n    operand 0 " in done.stdout


@pytest.mark.compiler
def test_source_needs_no_torch() -> None:
    source = targets.kernel(CASES["plain"]("float32").spec, "cpp").source
    assert source is not None
    included = [line for line in source.read_text().splitlines() if line.startswith("#include")]
    assert included and all("<" in line and "torch" not in line and "ATen" not in line for line in included)


@pytest.mark.compiler
def test_kernel_runs_in_a_forked_child() -> None:
    made = problem("float32", batch=(2, 4), q_len=300)
    kernel = targets.kernel(made.spec, "cpp")
    expected = kernel(made.operands, made.sizes)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as torch's own DataLoader does in its workers
        os._exit(0 if torch.equal(targets.kernel(made.spec, "cpp")(made.operands, made.sizes), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.compiler
def test_length_beyond_the_kernels_limit_takes_the_reference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuse.targets.cpp.render.MAX_LENGTH", 4)
    made = problem("float32", batch=(1, 1), q_len=5)
    kernel = targets.kernel(made.spec, "cpp")
    assert isinstance(kernel, CppKernel) and not kernel.runs.why
    with pytest.warns(RuntimeWarning, match=r"kernel .*\.cpp: calls of more than .* are left to the reference") as told:
        for _ in range(2):
            found = kernel(made.operands, made.sizes)
    assert len(told) == 1 and kernel.runs.by == "kernel" and "left to the reference" in kernel.runs.why
    assert torch.equal(found, reference.attention(made.spec, made.operands, made.sizes, "eager"))


@pytest.mark.skipif(sys.platform != "linux", reason="there is no priority of one thread")
def test_a_backward_kernel_that_nobody_has_asked_for_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation without torch.no_grad() prepares one, and waits for the forward kernel only."""
    priorities: list[int] = []

    def seen(*args: object) -> None:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        raise BuildFailed("nothing is built here")

    monkeypatch.setattr(target, "build", seen)
    monkeypatch.setattr(target, "build_backward", seen)
    spec, wanted = CASES["plain"]("float32").spec, (True, True, True)
    with pytest.warns(RuntimeWarning, match="nothing is built"):
        targets.kernel(spec, "cpp")
        targets.prepare_backward(spec, "cpp", wanted)
        targets.backward_kernel(spec, "cpp", wanted)
    forward, backward = priorities
    assert backward > forward == os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.compiler
def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, child = tmp_path / "c++", tmp_path / "child"
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {child}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(compiler, "_BUILD_SECONDS", 1)
    begin = time.monotonic()
    with pytest.raises(BuildFailed, match="had not ended after 1 s. Set CXX"):
        launch.build(CASES["unscaled"]("float32").spec)
    assert time.monotonic() - begin < 10
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # its parent is gone: whoever inherits it takes a moment
            os.kill(int(child.read_text()), 0)
            time.sleep(0.1)


AT_EXIT = """
import atexit, threading, time, torch, fuse
def attend(x):
    return (x @ x.mT * 0.25).softmax(-1) @ x
def last(where):
    x = torch.randn(2, 40, 16)
    done = torch.compile(attend, backend="fuse", options={"inner": "eager", "qualify": "never"})(x)
    torch.testing.assert_close(done, attend(x))
    print(where, fuse.report().sites[-1].fused)
def outlives():
    time.sleep(1)
    last("thread")
atexit.register(last, "exit")
threading.Thread(target=outlives).start()
"""


@pytest.mark.compiler
def test_a_kernel_is_built_in_place_where_the_interpreter_ends(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["thread True", "exit True"], done.stderr


WITHOUT_COMPILER = """
import torch, fuse
def attend(x):
    return torch.relu((x @ x.mT).softmax(-1) @ x) + 1
x = torch.randn(2, 40, 16, requires_grad=True)
for inner in ("inductor", "aot_eager", "eager"):
    torch._dynamo.reset()
    out = torch.compile(attend, backend="fuse", options={"inner": inner, "qualify": "never"})(x)
    torch.testing.assert_close((out, *torch.autograd.grad(out.sum(), x)), (attend(x), *torch.autograd.grad(attend(x).sum(), x)))
print(fuse.report().sites[-1].runs["forward"].by)
"""


def test_without_a_compiler_a_model_runs_with_every_inner_compiler(tmp_path: Path) -> None:
    folders = {
        "PATH": str(tmp_path),
        "FUSE_CACHE_DIR": str(tmp_path / "fuse"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "ind"),
    }
    env = {name: x for name, x in os.environ.items() if name != "CXX"} | folders
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, check=False, env=env)
    assert done.stdout == "reference\n", done.stderr
    assert done.stderr.count("Inductor has no C++ compiler, so that the graph runs operator by operator. Install g++") == 1
