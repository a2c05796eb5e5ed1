"""Whose files are loaded: the user's own, and those of a group with which the user shares a folder on purpose."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fuse.settings import settings


class NotPrivate(RuntimeError):
    """Others can write to what would be loaded; the message says where, and what to do."""


def make_private(folder: Path) -> None:
    """Makes ``folder``, for the user alone. Raises OSError where that cannot be."""
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def check_private(path: Path) -> None:
    """Of a file of the cache or one of its folders. Raises NotPrivate.

    A folder that FUSE_CACHE_DIR names may belong to somebody else, and to a group that writes to it: it was chosen. Root may
    write everywhere anyway. A folder of the user's own that a group could write to, as some systems make them, is closed.
    """
    if not hasattr(os, "getuid"):
        return
    found, chosen = path.stat(), bool(os.environ.get("FUSE_CACHE_DIR"))
    own = found.st_uid == os.getuid()
    if own and not chosen and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        path.chmod(stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        return
    if found.st_mode & stat.S_IWOTH:
        raise NotPrivate(f"everybody can write to {path}, so nothing there is loaded: chmod o-w it, {_OTHER}")
    if not own and not chosen and found.st_uid != 0:
        raise NotPrivate(f"{path} belongs to another user, so it is not loaded: remove it, {_OTHER}")


def check_folders(folder: Path) -> None:
    """Of a folder of kernels, and the cache that it lies in. Raises NotPrivate."""
    for each in (settings().cache_dir, folder):
        if each.is_dir():
            check_private(each)


_OTHER = "or set FUSE_CACHE_DIR to a folder of your own, or of a group that you trust"
