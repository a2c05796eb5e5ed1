"""Libraries that are not what was built: loading one never ends the process, and it is built again by itself.

Each is loaded in a child, which it might end; the compiler gives out what was compiled once.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gradients import check, floats, run
from specs import CASES

from fuse import targets
from fuse.ir import tile_map as tiles
from fuse.kernel.source import ENTRY
from fuse.report.runs import Runs
from fuse.targets import reference
from fuse.targets.cpp import compiler, launch
from fuse.targets.cpp.launch_backward import build_backward

pytestmark = [pytest.mark.compiler, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")]

# Gives out the library of a kernel's name, or another file; with neither, nothing. It always says that all went well.
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do case "$1" in *.cpp) name=$(basename "$1");; esac; shift; done
if [ -e {instead} ]; then cp {instead} "$2"; else cp {libraries}/"${{name%-*}}".so "$2"; fi
exit 0
"""
MADE, MAPPED = CASES["causal"]("float32"), CASES["mapped_bool"]("float32")
USE = tiles.map_of(MAPPED.spec)
assert USE is not None
MAP = USE.tile_map


def forward() -> Runs:
    kernel = targets.kernel(MADE.spec, "cpp")
    MADE.check(kernel(MADE.operands, MADE.sizes))
    return kernel.runs


def backward() -> Runs:
    kernel = targets.backward_kernel(MADE.spec, "cpp", floats(MADE))
    check(MADE, run(MADE, kernel), floats(MADE))
    return kernel.runs


def tile_map() -> Runs:
    mask = torch.ones(2, 100, 700, dtype=torch.bool).tril()
    kernel = targets.map_kernel(MAP, "cpp")
    assert torch.equal(kernel([mask], mask.shape), reference.tile_map(MAP, [mask], mask.shape))
    return kernel.runs


PARTS = {"forward": forward, "backward": backward, "tile map": tile_map}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libraries")
    built = launch.build(MADE.spec), build_backward(MADE.spec, floats(MADE)), launch.build_tile_map(MAP)
    for found in built:
        shutil.copy(found.source.with_suffix(".so"), folder / f"{found.source.stem.rpartition('-')[0]}.so")
    (folder / "other.cpp").write_text("int other;")
    command = [*compiler.cxx_compiler(), "-shared", "-fPIC", folder / "other.cpp", "-o", folder / "other.so"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of the cache; what lies in the file "instead" beside it is what the compiler gives out from then on."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(instead=tmp_path / "instead", libraries=libraries))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    targets.reset()
    yield tmp_path / "cpp"
    targets.reset()


def in_a_child(part: str) -> tuple[str, int]:
    """What computed a part of the problem in a new process, rightly, and how many kernels were built there."""
    targets.reset()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            before = targets.builds.count
            by = PARTS[part]().by
            os._exit(10 * (by == "kernel") + targets.builds.count - before)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code >= 0, f"ended by signal {-code}"
    assert code < 99, "wrong"
    return "kernel" if code >= 10 else "reference", code % 10


def cut(share: float, less: int = 0) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share) - less)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"cut to {share}": cut(share) for share in (0.0, 0.001, 0.01, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)},
    "cut by one byte": cut(1.0, 1),
    "garbage": garbage,
    "a folder": a_folder,
}


@pytest.mark.parametrize(
    ("part", "damage"), [("forward", d) for d in DAMAGES] + [("backward", "cut to 0.4"), ("tile map", "cut to 0.4")]
)
def test_a_damaged_library_is_built_again_once(folder: Path, part: str, damage: str) -> None:
    assert in_a_child(part) == ("kernel", 1)
    (library,) = folder.glob("*.so")
    DAMAGES[damage](library)
    assert in_a_child(part) == ("kernel", 1)
    assert in_a_child(part) == ("kernel", 0)


def test_a_library_without_the_entry_is_built_again_once(folder: Path, libraries: Path) -> None:
    assert in_a_child("forward") == ("kernel", 1)
    (library,) = folder.glob("*.so")
    shutil.copy(libraries / "other.so", library)
    assert in_a_child("forward") == ("kernel", 1)
    assert in_a_child("forward") == ("kernel", 0)


@pytest.mark.parametrize("made", ["nothing", "empty", "garbage", "half", "without the entry"])
def test_a_compiler_that_makes_no_kernel_and_says_it_did_leaves_no_entry(folder: Path, libraries: Path, made: str) -> None:
    instead, right = folder.with_name("instead"), next(libraries.glob("causal_float32*.so"))
    if made == "nothing":
        instead.mkdir()  # which cp without -r refuses
    else:
        half = right.read_bytes()[: right.stat().st_size // 2]
        other = (libraries / "other.so").read_bytes()
        instead.write_bytes({"empty": b"", "garbage": b"?" * 5000, "half": half, "without the entry": other}[made])
    assert in_a_child("forward") == ("reference", 0)
    assert {path.suffix for path in folder.iterdir()} <= {".cpp", ".lock"}
    instead.rename(folder.with_name("gone"))
    assert in_a_child("forward") == ("kernel", 1)


@pytest.mark.parametrize("does", ["__builtin_trap()", "_exit(0)", "for (;;) pause()"])
def test_a_library_that_ends_or_stops_the_process_that_loads_it_is_never_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    monkeypatch.setattr(compiler, "_PROBE_SECONDS", 2)
    source = folder.with_name("harmful.cpp")
    entry = f'extern "C" __attribute__((visibility("default"))) int {ENTRY}(const long*) {{ return 0; }}'
    source.write_text(f"#include <unistd.h>\n__attribute__((constructor)) void loaded() {{ {does}; }}\n{entry}\n")
    monkeypatch.delenv("CXX")
    command = [*compiler.cxx_compiler(), "-shared", "-fPIC", source, "-o", folder.with_name("instead")]
    monkeypatch.setenv("CXX", str(folder.with_name("compiler")))
    subprocess.run(command, check=True)
    assert in_a_child("forward") == ("reference", 0)
    with pytest.warns(RuntimeWarning, match="made a library of .* that ends or stops its process. Set CXX to another"):
        assert forward().by == "reference"


def test_what_says_that_no_kernel_was_made_names_its_source_and_what_to_do(folder: Path, libraries: Path) -> None:
    shutil.copy(libraries / "other.so", folder.with_name("instead"))
    with pytest.warns(RuntimeWarning, match=r"causal_float32.*\.cpp.*Set CXX to another"):
        assert forward().by == "reference"
