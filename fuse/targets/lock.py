"""One process or thread at a time: a file that is locked says who holds it, and is not waited for without end."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fuse.targets.files import share

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes may then do the same, and either result is right
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
# Seconds: longer than any build may take, and after which whoever waits is told why.
LIMIT, _TOLD, _PAUSE = 900.0, 20.0, 0.02


class Held(RuntimeError):
    """The lock was not to be had; the message says who holds it, and what to do."""


@contextlib.contextmanager
def locked(path: Path, limit: float | None = None) -> Iterator[None]:
    """Holds the lock of ``path``: every opening of the file has its own, and the system takes it from a process that ends.

    Whoever holds it may remove the file. Raises Held after ``limit`` seconds, LIMIT if not given.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() and not path.is_file():
        path.unlink()
    with _taken(path, LIMIT if limit is None else limit) as file:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def held(path: Path) -> bool:
    """Whether somebody holds the lock of ``path`` now, or may: who cannot read it cannot know."""
    try:
        if fcntl is not None and path.is_file():
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _taken(path: Path, limit: float) -> IO[str]:
    """The file, which is locked and still has its name: who held it before may have removed it."""
    while True:
        file = path.open("a+")
        with contextlib.suppress(OSError):  # it is another's
            share(path, path.parent)
        try:
            if fcntl is not None:
                _wait(file, path, limit)
            if _is_named(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_named(file: IO[str], path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _wait(file: IO[str], path: Path, limit: float) -> None:
    begin, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - begin
        if waited > limit:
            raise Held(f"{path} is held by {_holder(path)} for more than {limit:.0f} s: end it, or remove the file")
        if waited > _TOLD and not told:
            log.warning("a kernel is being built by %s, for %.0f s so far (%s)", _holder(path), waited, path)
            told = True
        time.sleep(_PAUSE)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip() or "another process"
    return "another process"
