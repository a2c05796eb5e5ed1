"""Built kernels on disk, addressed by what they are made of; shared between threads, processes and runs.

An entry is a source ``<name>-<key>.<suffix>`` and its binary beside it. The key is a digest of everything that the binary
depends on, so an entry is never stale; it is written under another name and renamed, so it is never half there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fuse.options import settings

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes may then build the same entry, and either result is right
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Entry:
    source: Path
    binary: Path


@dataclass
class Builds:
    """How many binaries this process has built; a warm cache builds none."""

    count: int = 0


builds = Builds()
_count_lock = threading.Lock()

Build = Callable[[Path, Path], None]


def entry(target: str, name: str, suffix: str, source: str, depends: str, build: Build) -> Entry:
    """The binary of ``source``, built by ``build(source, binary)`` if no run before has done so.

    depends  whatever else the binary depends on: compiler, flags, instruction set
    Raises what ``build`` raises, and leaves nothing behind then.
    """
    key = hashlib.sha256(f"{depends}\0{source}".encode()).hexdigest()[:20]
    folder = settings().cache_dir / target
    path = folder / f"{name}-{key}{suffix}"
    found = Entry(path, path.with_suffix(".so"))
    if found.binary.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not found.binary.exists():
            write_atomically(found.source, source)
            _build_atomically(found, build)
    return found


def _build_atomically(found: Entry, build: Build) -> None:
    with tempfile.TemporaryDirectory(dir=found.binary.parent, prefix=".build-") as scratch:
        binary = Path(scratch) / found.binary.name
        build(found.source, binary)
        os.replace(binary, found.binary)
    with _count_lock:
        builds.count += 1


def write_once(target: str, name: str, suffix: str, source: str) -> Path:
    """A file with the text ``source``, whose compiler keeps its results elsewhere."""
    folder = settings().cache_dir / target
    path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:20]}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, source)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".write-", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time, among threads and processes: every opening of the file holds its own lock."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
