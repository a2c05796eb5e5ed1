"""The list of kernels in the cache: what failed says so, and code is no comment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fuse.__main__ import main
from fuse.targets import cache, catalogue

SOURCE = "// out = sum over k\n//\n//   score  edit\n#define FUSE_WIDTH 16\n// behind the code\n"


def build(source: Path, binary: Path) -> None:
    binary.write_text("machine code")


def refuse(source: Path, binary: Path) -> None:
    raise cache.BuildFailed("no")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that was built, and a newer one that could not be."""
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    good = cache.entry("cpp", "good", ".cpp", SOURCE, "compiler", build, Path.read_text)
    os.utime(good.source, (0, 0))
    with pytest.raises(cache.BuildFailed):
        cache.entry("cpp", "bad", ".cpp", SOURCE, "compiler", refuse, Path.read_text)
    cache.write_once("triton", "module", ".py", "# out = sum over k\n#   score  edit\nimport triton\n")
    return tmp_path


def listed(name: str) -> catalogue.Listed:
    (found,) = [each for each in catalogue.catalogue() if each.source.name.startswith(name)]
    return found


def test_a_kernel_is_listed_with_the_comment_at_its_top(folder: Path) -> None:
    assert listed("good").about == ("out = sum over k", "", "  score  edit") and not listed("good").failed
    assert listed("module").about == ("out = sum over k", "  score  edit") and not listed("module").failed


def test_the_newest_comes_first(folder: Path) -> None:
    names = [each.source.name[:4] for each in catalogue.catalogue()]
    assert set(names[:2]) == {"bad-", "modu"} and names[2:] == ["good"]


def test_what_cannot_be_used_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "could not be built" in listed("bad").failed
    listed("good").source.with_suffix(".so").write_text("cut")
    assert listed("good").failed == "its library is not the one that was built"
    assert main(["kernels"]) == 0
    shown = capsys.readouterr().out
    assert f"{listed('bad').source} FAILED: it could not be built" in shown and "define" not in shown
    assert f"{listed('module').source}\n    out = sum over k\n" in shown
