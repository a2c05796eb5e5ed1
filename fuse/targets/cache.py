"""Built kernels on disk, addressed by what they are made of; shared between threads, processes and runs.

An entry is a source ``<name>-<key>.<suffix>``, its binary and a manifest beside it. The key is a digest of everything that the
binary depends on, so an entry is never stale. The manifest has the digests of both files and is written last: what a killed
process or a full disk left half done, and what was cut short or overwritten since, does not match it, and is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fuse.settings import settings
from fuse.targets.lock import Held, locked
from fuse.targets.private import NotPrivate, check_folders, check_private, make_private

FORMAT = 1  # of manifests
T = TypeVar("T")


class BuildFailed(RuntimeError):
    """No kernel could be built here; the message says why, and what to do where that is known."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """``loaded`` is what ``load`` gave for the binary."""

    source: Path
    binary: Path
    loaded: T


@dataclass
class Builds:
    """How many binaries this process has built; a warm cache builds none."""

    count: int = 0


builds = Builds()
_count_lock = threading.Lock()

Build = Callable[[Path, Path], None]


def entry(target: str, name: str, suffix: str, source: str, depends: str, build: Build, load: Callable[[Path], T]) -> Entry[T]:
    """The binary of ``source``, built by ``build(source, binary)`` if no run before has left one that is whole.

    depends  whatever else the binary depends on: compiler, flags, instruction set
    load     makes of a binary what its user needs; raises BuildFailed where it is not that
    Raises BuildFailed, and what ``build`` raises; nothing that a later run would take is left behind then.
    """
    key = hashlib.sha256(f"{depends}\0{source}".encode()).hexdigest()[:20]
    folder = settings().cache_dir / target
    _refuse_what_others_write(folder)
    wanted = _Wanted(folder / f"{name}-{key}{suffix}", source, depends)
    found = wanted.kept(load)
    if found is None:
        with _told(folder), locked(wanted.path.with_suffix(".lock")):
            found = wanted.kept(load) or wanted.built(build, load)
    return found


@dataclass(frozen=True)
class _Wanted:
    """An entry that may be there or not."""

    path: Path
    source: str
    depends: str

    @property
    def binary(self) -> Path:
        return self.path.with_suffix(".so")

    @property
    def manifest(self) -> Path:
        return self.path.with_suffix(".json")

    def kept(self, load: Callable[[Path], T]) -> Entry[T] | None:
        """What an earlier run has left, if every byte of it is as it was then and it can be loaded."""
        if content(self.path) != self.source.encode():
            return None
        binary, manifest = content(self.binary), content(self.manifest)
        if binary is None or manifest != self._described(binary).encode():
            return None
        with contextlib.suppress(BuildFailed, NotPrivate):  # right, but not for this machine any more: it lacks a library, say
            check_private(self.binary)
            return Entry(self.path, self.binary, load(self.binary))
        return None

    def built(self, build: Build, load: Callable[[Path], T]) -> Entry[T]:
        """What is not whole goes first, so that a failed build leaves nothing; it is loaded before it is given its name."""
        for path in (self.manifest, self.binary):
            _remove(path)
        write_atomically(self.path, self.source)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".build-") as scratch:
            made = Path(scratch) / self.binary.name
            build(self.path, made)
            data = content(made)
            if data is None:
                raise BuildFailed(f"nothing was built of {self.path}")
            try:
                loaded = load(made)
            except BuildFailed as error:
                raise BuildFailed(f"what was built of {self.path} cannot be used: {error}") from error
            with made.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(made, self.binary)
        write_atomically(self.manifest, self._described(data))
        with _count_lock:
            builds.count += 1
        return Entry(self.path, self.binary, loaded)

    def _described(self, binary: bytes) -> str:
        """The manifest, a function of what it describes: whoever has that compares texts, and reads none that may be broken."""
        files = {self.path.name: self.source.encode(), self.binary.name: binary}
        digests = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
        return json.dumps({"format": FORMAT, "files": digests, "depends": self.depends.splitlines()}, indent=1) + "\n"


def write_once(target: str, name: str, suffix: str, source: str) -> Path:
    """A file with the text ``source``, whose compiler keeps its results elsewhere. Raises BuildFailed."""
    folder = settings().cache_dir / target
    path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:20]}{suffix}"
    _refuse_what_others_write(folder)
    if content(path) != source.encode():
        with _told(folder):
            write_atomically(path, source)
    return path


def content(path: Path) -> bytes | None:
    """What a file holds; None where there is none, or something else in its place."""
    try:
        return path.read_bytes() if stat.S_ISREG(path.stat().st_mode) else None
    except OSError:
        return None


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new, never a part, even if the machine stops; what else is in its place is removed."""
    if path.is_dir():
        _remove(path)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".write-", encoding="utf-8", newline="", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Makes names last, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_what_others_write(folder: Path) -> None:
    try:
        check_folders(folder)
    except NotPrivate as error:
        raise BuildFailed(str(error)) from error


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Makes ``folder``. What the system refuses there is something that the user can change."""
    try:
        make_private(folder)
        yield
    except Held as error:
        raise BuildFailed(str(error)) from error
    except OSError as error:
        raise BuildFailed(
            f"{error}. Kernels are kept in {folder}: make it writable, or set FUSE_CACHE_DIR to a folder that is"
        ) from error
