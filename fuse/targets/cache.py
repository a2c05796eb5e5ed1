"""Built kernels on disk, addressed by what they are made of; shared between threads, processes and runs.

An entry is a source ``<name>-<key>.<suffix>``, its binary and a manifest beside it. The key is a digest of everything that the
binary depends on, so an entry is never stale. The manifest has the digests of both files and is written last: what a killed
process or a full disk left half done, and what was cut short or overwritten since, does not match it, and is built again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fuse.settings import settings
from fuse.targets import artifacts
from fuse.targets.files import content, mark_used, remove, share, write_atomically
from fuse.targets.lock import Held, locked
from fuse.targets.manifest import digest, key, manifest
from fuse.targets.private import NotPrivate, check_folders, check_private, make_private
from fuse.targets.stored import BUILDING, LIBRARY, LOCK, MANIFEST

T = TypeVar("T")
log = logging.getLogger(__name__)


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
    folder = settings().cache_dir / target
    _refuse_what_others_write(folder)
    wanted = _Wanted(folder / f"{name}-{key(source, depends)}{suffix}", source, depends)
    found = wanted.kept(load)
    if found is None:
        with _told(folder), locked(wanted.path.with_suffix(LOCK)):
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
        return self.path.with_suffix(LIBRARY)

    @property
    def manifest(self) -> Path:
        return self.path.with_suffix(MANIFEST)

    def kept(self, load: Callable[[Path], T]) -> Entry[T] | None:
        """What an earlier run has left, if every byte of it is as it was then and it can be loaded."""
        if content(self.path) != self.source.encode():
            return None
        binary = content(self.binary)
        if binary is None or content(self.manifest) != (told := self._described(binary)):
            return None
        with contextlib.suppress(BuildFailed, NotPrivate):  # right, but not for this machine any more: it lacks a library, say
            check_private(self.binary)
            found = Entry(self.path, self.binary, load(self.binary))
            mark_used(self.manifest)
            self._keep(binary, told)
            return found
        return None

    def built(self, build: Build, load: Callable[[Path], T]) -> Entry[T]:
        """What is not whole goes first, so that a failed build leaves nothing; it is loaded before it is given its name."""
        for path in (self.manifest, self.binary):
            remove(path)
        write_atomically(self.path, self.source)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f"{BUILDING}{self.path.stem}-") as scratch:
            made = Path(scratch) / self.binary.name
            begun = time.monotonic()
            build(self.path, made)
            log.info("built %s in %.1f s", self.path, time.monotonic() - begun)
            data = content(made)
            if data is None:
                raise BuildFailed(f"nothing was built of {self.path}")
            try:
                loaded = load(made)
            except BuildFailed as error:
                raise BuildFailed(f"what was built of {self.path} cannot be used: {error}") from error
            with made.open("rb") as file:
                os.fsync(file.fileno())
            share(made, self.path.parent)
            os.replace(made, self.binary)
        write_atomically(self.manifest, told := self._described(data))
        with _count_lock:
            builds.count += 1
        self._keep(data, told)
        return Entry(self.path, self.binary, loaded)

    def _described(self, binary: bytes) -> bytes:
        return manifest(self._files(binary), self.depends).encode()

    def _files(self, binary: bytes) -> dict[str, bytes]:
        return {self.path.name: self.source.encode(), self.binary.name: binary}

    def _keep(self, binary: bytes, described: bytes) -> None:
        artifacts.keep(self.path.parent.name, self.path.stem, {**self._files(binary), self.manifest.name: described})


def write_once(target: str, name: str, suffix: str, source: str) -> Path:
    """A file with the text ``source``, whose compiler keeps its results elsewhere. Raises BuildFailed."""
    folder = settings().cache_dir / target
    data = source.encode()
    path = folder / f"{name}_{digest(data)}{suffix}"
    _refuse_what_others_write(folder)
    if content(path) != data:
        with _told(folder):
            write_atomically(path, data)
    mark_used(path)
    artifacts.keep(target, path.name, {path.name: data})
    return path


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
