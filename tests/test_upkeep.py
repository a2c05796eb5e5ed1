"""python -m fuse cache --check and --prune: what is in the cache, what is wrong with it, and what goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fuse.__main__ import main
from fuse.targets import records, upkeep
from fuse.targets.cache import builds, entry, write_once
from fuse.targets.lock import locked

DAY = 24 * 3600
VERDICT = "verdict-0123456789abcdef0123.json"
# Builds until it is killed, or told on its standard input to finish.
BUILDING = """
import sys
from pathlib import Path
from fuse.targets.cache import entry

def build(source, binary):
    binary.write_text("half")
    print("building", flush=True)
    sys.stdin.readline()

entry("cpp", "slow", ".cpp", "text", "flags", build, Path.read_text)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a cache with two kernels, a source and a verdict."""
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    kernel("first")
    kernel("second")
    write_once("triton", "attention", ".py", "x = 1\n")
    records.write(tmp_path / "cpp" / VERDICT, {"verdict": 1.5})
    return tmp_path / "cpp"


def kernel(name: str) -> Path:
    def build(source: Path, binary: Path) -> None:
        binary.write_text(source.read_text())

    return entry("cpp", name, ".cpp", f"text of {name}", "compiler\nflags", build, Path.read_text).binary


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["cache", *arguments])
    return code, capsys.readouterr().out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def aged(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY,) * 2)


# --------------------------------------------------------------------------------------------------------------- --check


def test_a_cache_that_is_whole_is_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "--check")
    assert code == 0 and said.splitlines()[1:] == ["    4 whole, 0 broken, 0 left over, 0 in use"]


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "library is cut short": ("first*.so", lambda p: os.truncate(p, 3), "its library is not the one that was built"),
    "library is gone": ("first*.so", Path.unlink, "its library is gone"),
    "library is a folder": ("first*.so", lambda p: (p.unlink(), p.mkdir()), "is no file that can be read"),
    "source is another": ("first*.cpp", lambda p: p.write_text("text"), "its source is not the one that it is named for"),
    "source is no text": ("first*.cpp", lambda p: p.write_bytes(b"\xff"), "its source is not the one that it is named for"),
    "source is gone": ("first*.cpp", Path.unlink, "its source is gone"),
    "manifest is gone": ("first*.json", Path.unlink, "its manifest is gone"),
    "manifest is empty": ("first*.json", lambda p: os.truncate(p, 0), "its manifest cannot be read"),
    "manifest is another's": (
        "first*.json",
        lambda p: p.write_bytes(next(p.parent.glob("second*.json")).read_bytes()),
        "its library is not the one that was built",
    ),
    "verdict is another": (VERDICT, lambda p: p.write_text(p.read_text().replace("1.5", "2.5")), "it is not as it was written"),
    "verdict is empty": (VERDICT, lambda p: os.truncate(p, 0), "it is not as it was written"),
    "triton source is another": ("../triton/*.py", lambda p: p.write_text("x = 2\n"), "it is not as it was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_broken_is_named_with_what_is_wrong_and_goes(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    pattern, break_it, why = DAMAGES[damage]
    (path,) = folder.glob(pattern)
    break_it(path)
    code, said = run(capsys, "--check")
    (line,) = [line for line in said.splitlines() if line.startswith("    broken")]
    assert code == 1 and path.stem in line and why in line and "3 whole, 1 broken" in said and "cache --prune" in said
    code, said = run(capsys, "--prune")
    assert code == 0 and f"broken: {why}" in said.replace(f"{path.name} ", "")
    assert not [name for name in names(path.parent.resolve()) if name.startswith(path.stem)]
    assert run(capsys, "--check")[0] == 0 and len(list(upkeep.items())) == 3


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files")
def test_what_others_can_write_to_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.chmod(0o770)
    assert run(capsys, "--check") == (0, run(capsys, "--check")[1]) and "its group can write to it" in run(capsys, "--check")[1]
    library = next(folder.glob("first*.so"))
    library.chmod(0o666)
    code, said = run(capsys, "--check")
    assert code == 1 and f"everybody can write to {library}, so nothing there is loaded" in said
    library.chmod(0o600)
    folder.chmod(0o700)
    assert run(capsys, "--check")[0] == 0


def test_looking_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent.parent))
    monkeypatch.delenv("FUSE_CACHE_DIR")
    os.truncate(next(folder.glob("first*.so")), 1)
    folder.chmod(0o777)
    before = {path: path.lstat() for path in folder.rglob("*")}
    run(capsys, "--check")
    assert {path: path.lstat() for path in folder.rglob("*")} == before and folder.stat().st_mode & 0o777 == 0o777


# --------------------------------------------------------------------------------------------------------------- --prune


def test_what_was_not_used_for_days_goes_and_using_it_keeps_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (*folder.iterdir(), *(folder.parent / "triton").iterdir()):
        aged(path, 40)
    kernel("second")
    assert records.read(folder / VERDICT) == {"verdict": 1.5}
    code, said = run(capsys, "--prune", "30")
    assert code == 0 and said.count("not used for 40 days") == 2 and "first" in said and "attention_" in said
    assert {name.partition("-")[0] for name in names(folder)} == {"second", "verdict"} and not names(folder.parent / "triton")
    assert "0.0 MB freed" in run(capsys, "--prune", "30")[1]


def test_without_days_nothing_whole_goes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.iterdir():
        aged(path, 4000)
    before = names(folder)
    code, said = run(capsys, "--prune")
    assert code == 0 and names(folder) == before and said.splitlines()[1:] == ["    0.0 MB freed"]


@pytest.mark.parametrize("days", ["-1", "nan", "soon"])
def test_days_are_a_number(folder: Path, capsys: pytest.CaptureFixture[str], days: str) -> None:
    with pytest.raises(SystemExit):
        main(["cache", f"--prune={days}"])
    assert f"'{days}' is no number of days: give 30" in capsys.readouterr().err


def test_what_is_not_of_fuse_is_named_and_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes.txt").touch()
    (folder / "__pycache__").mkdir()
    code, said = run(capsys, "--check")
    assert code == 0 and "foreign    cpp/notes.txt" in said
    run(capsys, "--prune", "0")
    assert names(folder) == ["__pycache__", "notes.txt"]


def test_a_file_that_was_being_written_is_left_over_when_it_is_old(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".write-abc").touch()
    assert "1 in use" in run(capsys, "--check")[1]
    run(capsys, "--prune", "0")
    assert names(folder) == [".write-abc"]
    aged(folder / ".write-abc", 1)
    code, said = run(capsys, "--check")
    assert code == 0 and "left over  cpp/.write-abc" in said
    run(capsys, "--prune")
    assert names(folder) == []


def building() -> subprocess.Popen[str]:
    """A process that builds the kernel "slow"."""
    process = subprocess.Popen([sys.executable, "-c", BUILDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    return process


def test_what_is_being_built_stays_whatever_its_age(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = building()
    for path in folder.rglob("*"):
        aged(path, 40)
    code, said = run(capsys, "--check")
    assert code == 0 and "2 in use" in said  # the kernel, and the folder of its build
    run(capsys, "--prune", "0")
    process.communicate("\n")
    assert process.returncode == 0 and run(capsys, "--check")[1].splitlines()[1:] == [
        "    1 whole, 0 broken, 0 left over, 0 in use"
    ]


def test_what_a_killed_build_has_left_goes_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = building()
    process.kill()
    process.communicate()
    code, said = run(capsys, "--check")
    assert code == 0 and "2 left over" in said and "4 whole" in said
    run(capsys, "--prune")
    assert not [name for name in names(folder) if "slow" in name]
    assert run(capsys, "--check")[1].splitlines()[1:] == ["    4 whole, 0 broken, 0 left over, 0 in use"]


def test_who_is_interrupted_leaves_nothing_that_is_taken_for_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []

    def interrupted(path: Path) -> None:
        removed.append(path)
        path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(upkeep.prune(0))
    before = builds.count
    kernel("first")
    assert removed[0].suffix == ".json" and builds.count == before + 1


def test_what_cannot_be_removed_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    os.truncate(next(folder.glob("first*.so")), 1)
    monkeypatch.setattr(upkeep, "remove", refused)
    code, said = run(capsys, "--prune")
    assert code == 1 and "cpp/first" in said and "not deleted: " in said and "Permission denied" in said


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path: Path) -> None:
    """Else two would hold it: who waited for the file that is gone, and who made the next."""
    waiter = """
import sys
from pathlib import Path
from fuse.targets.lock import locked
print("waits", flush=True)
with locked(Path(sys.argv[1])):
    print(Path(sys.argv[1]).exists(), flush=True)
"""
    path = tmp_path / "x.lock"
    with locked(path):
        process = subprocess.Popen([sys.executable, "-c", waiter, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        time.sleep(0.1)
        path.unlink()
    assert process.communicate()[0] == "True\n"
