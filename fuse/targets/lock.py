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

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes may then do the same, and either result is right
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("fuse")
# Seconds: longer than any build may take, and after which whoever waits is told why.
LIMIT, _TOLD, _PAUSE = 900.0, 20.0, 0.02


class Held(RuntimeError):
    """The lock was not to be had; the message says who holds it, and what to do."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of ``path``: every opening of the file has its own, and the system takes it from a process that ends.

    Raises Held after LIMIT seconds.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() and not path.is_file():
        path.unlink()
    with path.open("a+") as file:
        if fcntl is not None:
            _wait(file, path)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _wait(file: IO[str], path: Path) -> None:
    begin, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - begin
        if waited > LIMIT:
            raise Held(f"{path} is held by {_holder(path)} for more than {LIMIT:.0f} s: end it, or remove the file")
        if waited > _TOLD and not told:
            log.warning("a kernel is being built by %s, for %.0f s so far (%s)", _holder(path), waited, path)
            told = True
        time.sleep(_PAUSE)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip() or "another process"
    return "another process"
