"""Files of the cache and of dumps: read whole or not at all, and written so that nobody sees a part of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

UNFINISHED = ".write-"  # what the names of files begin with until they are whole
_DAY = 24 * 3600.0


def content(path: Path) -> bytes | None:
    """What a file holds; None where there is none, or something else in its place."""
    try:
        return path.read_bytes() if stat.S_ISREG(path.stat().st_mode) else None
    except OSError:
        return None


def write_atomically(path: Path, data: str | bytes) -> None:
    """Readers see the old text or the new, never a part, even if the machine stops; what else is in its place is removed."""
    if path.is_dir():
        remove(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED, delete=False) as file:
        try:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            share(Path(file.name), path.parent)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    _sync(path.parent)


def share(path: Path, folder: Path) -> None:
    """Lets those read and write the file ``path`` who can do so with ``folder``, where it will lie: the user, or a group too.

    Others may read it at most, and a group where the folder keeps its members from removing each other's files.
    """
    mode = folder.stat().st_mode
    path.chmod(0o600 | mode & (0o044 if mode & stat.S_ISVTX else 0o064))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mark_used(path: Path) -> None:
    """Keeps the time of ``path`` at that of its last use, to a day: systems do not keep one that can be relied on."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)


def _sync(folder: Path) -> None:
    """Makes names last, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
