"""The cache of built kernels."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fuse.targets import lock
from fuse.targets.cache import BuildFailed, Entry, builds, entry, write_once

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from fuse.targets.cache import builds, entry

def build(source, binary):
    time.sleep(0.3)
    binary.write_text(source.read_text())
    if sys.argv[1:]:
        os.kill(os.getpid(), signal.SIGKILL)

entry("test", "kernel", ".txt", "text", "flags", build, Path.read_text)
print(builds.count)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    return tmp_path


def copy(source: Path, binary: Path) -> None:
    binary.write_text(source.read_text())


def made(source: str = "text", depends: str = "flags", load: Callable[[Path], str] = Path.read_text) -> Entry[str]:
    return entry("test", "kernel", ".txt", source, depends, copy, load)


def built(source: str = "text", depends: str = "flags") -> Path:
    return made(source, depends).binary


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


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)


def test_processes_that_ask_together_build_once(folder: Path) -> None:
    assert sum(int(process.communicate()[0]) for process in [start() for _ in range(3)]) == 1


def test_what_a_killed_process_was_building_is_built_again_once_by_those_that_ask_together(folder: Path) -> None:
    assert start("killed").wait() < 0
    assert sum(int(process.communicate()[0]) for process in [start(), start()]) == 1
    assert made().loaded == "text"


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


# ------------------------------------------------------------------------------------------ what is read back is checked


def replaced(path: Path, how: Callable[[Path], object]) -> None:
    path.unlink()
    how(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "one byte is another": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "another JSON": lambda path: path.write_text("[[]]"),
    "gone": Path.unlink,
    "a folder": lambda path: replaced(path, lambda p: (p / "in").mkdir(parents=True)),
    "a dangling link": lambda path: replaced(path, lambda p: p.symlink_to("nowhere")),
    "a pipe": lambda path: replaced(path, os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".txt", ".so", ".json"])
def test_an_entry_that_is_not_as_it_was_left_is_built_again_once(folder: Path, suffix: str, damage: str) -> None:
    DAMAGES[damage](built().with_suffix(suffix))
    before = builds.count
    again = made()
    assert again.loaded == again.source.read_text() == again.binary.read_text() == "text"
    assert builds.count == before + 1
    assert made().loaded == "text" and builds.count == before + 1


def test_a_manifest_says_what_its_files_hold_and_were_made_with(folder: Path) -> None:
    manifest = json.loads(built(depends="compiler\nflags").with_suffix(".json").read_text())
    assert {name.rpartition(".")[2]: facts["size"] for name, facts in manifest["files"].items()} == {"txt": 4, "so": 4}
    assert all(len(facts["sha256"]) == 64 for facts in manifest["files"].values())
    assert manifest["depends"] == ["compiler", "flags"] and manifest["format"] == 1


def test_a_manifest_of_another_entry_is_none(folder: Path) -> None:
    manifest = built().with_suffix(".json")
    manifest.write_bytes(built(depends="other").with_suffix(".json").read_bytes())
    before = builds.count
    built()
    assert builds.count == before + 1


def test_what_cannot_be_loaded_is_an_error_and_no_entry(folder: Path) -> None:
    def refuse(binary: Path) -> str:
        raise BuildFailed("no entry in it")

    for _ in range(2):
        with pytest.raises(BuildFailed, match="no entry in it"):
            made(load=refuse)
        assert {path.suffix for path in (folder / "test").iterdir()} <= {".txt", ".lock"}
    assert made().loaded == "text"


def test_a_build_that_fails_leaves_nothing_of_what_was_there(folder: Path) -> None:
    def nothing(source: Path, binary: Path) -> None:
        pass

    os.truncate(built(), 1)
    with pytest.raises(BuildFailed, match="nothing was built of .*kernel"):
        entry("test", "kernel", ".txt", "text", "flags", nothing, Path.read_text)
    assert {path.suffix for path in (folder / "test").iterdir()} <= {".txt", ".lock"}


@pytest.mark.parametrize("there", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_in_the_place_of_a_lock_makes_room(folder: Path, there: Callable[[Path], None]) -> None:
    lock = built().with_suffix(".lock")
    lock.with_suffix(".so").unlink()
    lock.unlink()
    there(lock)
    assert made().loaded == "text" and lock.is_file()


def test_what_is_whole_but_can_no_longer_be_loaded_is_built_again(folder: Path) -> None:
    loads: list[Path] = []

    def first_fails(binary: Path) -> str:
        loads.append(binary)
        if len(loads) <= 2:  # without the lock, and with it
            raise BuildFailed("a library that it needs is gone")
        return binary.read_text()

    built()
    before = builds.count
    assert made(load=first_fails).loaded == "text" and builds.count == before + 1


def test_every_file_is_on_the_disk_before_it_has_its_name_and_the_manifest_is_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    named: list[tuple[str, bool]] = []
    sync, rename = os.fsync, os.replace

    def seen_sync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        sync(handle)

    def seen_rename(old: Path, new: Path) -> None:
        named.append((Path(new).suffix, os.stat(old).st_ino in synced))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", seen_sync)
    monkeypatch.setattr(os, "replace", seen_rename)
    built()
    assert named == [(".txt", True), (".so", True), (".json", True)]
    assert (folder / "test").stat().st_ino in synced


def test_a_folder_that_cannot_be_written_is_told_with_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / "file" / "below"))
    for make in (built, lambda: write_once("test", "kernel", ".txt", "text")):
        with pytest.raises(BuildFailed, match="file/below.*set FUSE_CACHE_DIR"):
            make()


def test_a_file_that_could_not_be_written_is_not_left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildFailed, match="no space left"):
        write_once("test", "kernel", ".txt", "text")
    assert list((folder / "test").iterdir()) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_source_that_is_read_back_is_written_again_if_it_is_another(folder: Path, damage: str) -> None:
    path = write_once("test", "kernel", ".txt", "text")
    DAMAGES[damage](path)
    assert write_once("test", "kernel", ".txt", "text") == path and path.read_text() == "text"


# -------------------------------------------------------------------------------------------------------- whose files


@pytest.fixture
def unchosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is where it is if nobody chooses another place."""
    monkeypatch.delenv("FUSE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fuse"


def test_folders_are_made_for_the_user_alone_and_closed_where_a_group_could_write(unchosen: Path) -> None:
    there = made()
    assert [stat.S_IMODE(f.stat().st_mode) for f in (unchosen, unchosen / "test")] == [0o700, 0o700]
    for path in (unchosen, unchosen / "test", there.binary):
        path.chmod(0o777)
    made()
    assert not any(f.stat().st_mode & 0o022 for f in (unchosen, unchosen / "test", there.binary))


def test_a_folder_that_everybody_can_write_to_is_refused(folder: Path) -> None:
    made()
    folder.chmod(0o777)
    with pytest.raises(BuildFailed, match="everybody can write to .*chmod o-w it, or set FUSE_CACHE_DIR"):
        made()


def test_a_group_may_share_a_folder_that_it_has_chosen(folder: Path) -> None:
    before = builds.count
    made()
    for path in (folder, folder / "test"):
        path.chmod(0o770)
    made()
    assert builds.count == before + 1


@pytest.mark.parametrize(("cache", "folders", "files"), [(0o2770, 0o2770, 0o660), (0o770, 0o770, 0o660), (0o700, 0o700, 0o600)])
def test_what_is_made_in_a_shared_folder_is_the_groups_too(folder: Path, cache: int, folders: int, files: int) -> None:
    folder.chmod(cache)
    made()
    write_once("test", "module", ".py", "x = 1\n")
    assert stat.S_IMODE((folder / "test").stat().st_mode) == folders
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder / "test").iterdir()} == {files}


@pytest.mark.parametrize("whose", ["folder", "library"])
def test_what_another_user_owns_is_not_loaded(unchosen: Path, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    there, before = made(), builds.count
    foreign = unchosen if whose == "folder" else there.binary
    inode, uid = foreign.stat().st_ino, os.getuid()
    real = Path.stat

    def stat_of(path: Path, **how: Any) -> os.stat_result:
        found = list(real(path, **how))
        found[4] = uid + 1 if found[1] == inode else found[4]
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat_of)
    if whose == "folder":
        with pytest.raises(BuildFailed, match="belongs to another user"):
            made()
    else:
        made()
        assert builds.count == before + 1


def test_who_waits_for_a_lock_is_told_who_holds_it_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "LIMIT", 0.3)
    monkeypatch.setattr(lock, "_TOLD", 0.1)
    told = pytest.raises(lock.Held, match=f"is held by process {os.getpid()} on .* end it, or remove the file")
    with lock.locked(tmp_path / "x.lock"), caplog.at_level("WARNING", "fuse"), told, lock.locked(tmp_path / "x.lock"):
        pass
    assert f"is being built by process {os.getpid()}" in caplog.text
    with lock.locked(tmp_path / "x.lock"):
        pass
