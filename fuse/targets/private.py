"""Whose files are loaded: the user's own, and those of a group with which the user shares a folder on purpose."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fuse.settings import settings

EVERYBODY, ANOTHER, GROUP = "everybody", "another user, whose it is", "its group"


class NotPrivate(RuntimeError):
    """Others can write to what would be loaded; the message says where, and what to do."""


def make_private(folder: Path) -> None:
    """Makes ``folder``, for the user alone, or for the group that shares the chosen cache around it. Raises OSError."""
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    above = folder.parent.stat().st_mode
    if _chosen() and folder.parent == settings().cache_dir and above & stat.S_IWGRP:
        folder.chmod(0o700 | above & (stat.S_ISGID | stat.S_IRWXG))


def open_to(path: Path) -> str:
    """Who beside the user can write to ``path``: EVERYBODY, ANOTHER (but for root, who can anyway), GROUP, or ""."""
    if not hasattr(os, "getuid"):
        return ""
    found = path.stat()
    if found.st_mode & stat.S_IWOTH:
        return EVERYBODY
    if found.st_uid not in (os.getuid(), 0):
        return ANOTHER
    return GROUP if found.st_mode & stat.S_IWGRP else ""


def refusal(path: Path) -> str:
    """Why nothing of ``path``, a file of the cache or one of its folders, is loaded; "" where it may be.

    A folder that FUSE_CACHE_DIR names may belong to somebody else, and to a group that writes to it: it was chosen.
    """
    who = open_to(path)
    if who == EVERYBODY and not _closable(path):
        return f"everybody can write to {path}, so nothing there is loaded: chmod o-w it, {_OTHER}"
    if who == ANOTHER and not _chosen():
        return f"{path} belongs to another user, so it is not loaded: remove it, {_OTHER}"
    return ""


def check_private(path: Path) -> None:
    """Raises NotPrivate for what ``refusal`` names. What is the user's own, and was not chosen to be shared, is closed."""
    if why := refusal(path):
        raise NotPrivate(why)
    if open_to(path) and _closable(path):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def _chosen() -> bool:
    return bool(os.environ.get("FUSE_CACHE_DIR"))


def _closable(path: Path) -> bool:
    """A folder of the user's own that others could write to, as some systems make them."""
    return not _chosen() and path.stat().st_uid == os.getuid()


def check_folders(folder: Path) -> None:
    """Of a folder of kernels, and the cache that it lies in. Raises NotPrivate."""
    for each in (settings().cache_dir, folder):
        if each.is_dir():
            check_private(each)


_OTHER = "or set FUSE_CACHE_DIR to a folder of your own, or of a group that you trust"
