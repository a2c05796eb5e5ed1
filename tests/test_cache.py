"""The cache of built kernels."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fuse.runtime.cache import builds, entry

PROGRAM = """
import sys, time
from pathlib import Path
from fuse.runtime.cache import builds, entry

def build(source, binary):
    time.sleep(0.3)
    binary.write_text(source.read_text())

entry("test", "kernel", ".txt", "text", "flags", build, Path.read_text)
print(builds.count)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    return tmp_path


def copy(source: Path, binary: Path) -> None:
    binary.write_text(source.read_text())


def built(source: str = "text", depends: str = "flags") -> Path:
    return entry("test", "kernel", ".txt", source, depends, copy, Path.read_text).binary


def test_same_source_is_built_once(folder: Path) -> None:
    before = builds.count
    assert built() == built()
    assert builds.count == before + 1


def test_other_source_or_other_flags_is_another_entry(folder: Path) -> None:
    assert len({built(), built(source="other"), built(depends="other")}) == 3


def test_threads_that_ask_together_build_once(folder: Path) -> None:
    before = builds.count
    with ThreadPoolExecutor(8) as pool:
        assert len({path for path in pool.map(lambda _: built(), range(32))}) == 1
    assert builds.count == before + 1


def test_processes_that_ask_together_build_once(folder: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(int(process.communicate()[0]) for process in running) == 1


def test_failed_build_leaves_nothing_that_a_later_one_would_take(folder: Path) -> None:
    def fail(source: Path, binary: Path) -> None:
        binary.write_text("half")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        entry("test", "kernel", ".txt", "text", "flags", fail, Path.read_text)
    assert built().read_text() == "text"


def test_nothing_but_sources_binaries_manifests_and_locks_stays_behind(folder: Path) -> None:
    built()
    assert {path.suffix for path in (folder / "test").iterdir()} == {".txt", ".so", ".json", ".lock"}
