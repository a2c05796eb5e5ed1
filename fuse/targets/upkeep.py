"""What is in the cache, whether it is whole, and the removal of what is not, or was not used for long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fuse.settings import settings
from fuse.targets import registry
from fuse.targets.files import remove
from fuse.targets.lock import LIMIT, Held, held, locked
from fuse.targets.private import GROUP, open_to, refusal
from fuse.targets.stored import MANIFEST, Stored, never_built, problem, stored

State = Literal["whole", "broken", "left over", "in use", "foreign"]
_DAY = 24 * 3600.0


@dataclass(frozen=True)
class Finding:
    """``why``: what is wrong with it, or who uses it."""

    state: State
    why: str = ""


@dataclass(frozen=True)
class Removal:
    """What became of something that had to go. ``failed``: why it is there still, or in part."""

    item: Stored
    why: str
    size: int
    failed: str = ""


@dataclass(frozen=True)
class Access:
    """A file or folder that somebody else can write to. ``refused``: why nothing of it is loaded, if that is so."""

    path: Path
    who: str
    refused: str


def items() -> Iterator[Stored]:
    """All that the cache holds, by target and name."""
    for folder in _folders():
        yield from stored(folder)


def examine(item: Stored) -> Finding:
    """Reads ``item`` whole."""
    if item.kind == "foreign":
        return Finding("foreign", "it is nothing of fuse, and left alone")
    if item.lock is not None and held(item.lock):
        return Finding("in use", "it is being built")
    return _examined(item)


def _examined(item: Stored) -> Finding:
    """As ``examine``, where nobody builds it."""
    if item.kind == "partial":
        if item.lock is None and _unused(item) < LIMIT:
            return Finding("in use", "it is being written, it seems")
        return Finding("left over", "whoever wrote it has ended")
    contents = item.contents()
    if item.kind == "kernel" and never_built(contents):
        return Finding("left over", "it was never built")
    why = problem(item.kind, item.name, contents)
    return Finding("broken" if why else "whole", why)


def size(item: Stored) -> int:
    """In bytes, with all that lies in folders."""
    files = [inside for path in item.paths for inside in (path.rglob("*") if path.is_dir() else (path,))]
    return sum(file.lstat().st_size for file in files)


def accesses() -> Iterator[Access]:
    """Whatever others can write to; of what a group can, its folders."""
    folders = {settings().cache_dir, *_folders()}
    for path in (*sorted(folders), *(path for item in items() for path in item.paths)):
        if path.exists() and (who := open_to(path)) and (path in folders or who != GROUP):
            yield Access(path, who, refusal(path))


def prune(days: float) -> Iterator[Removal]:
    """Removes what is broken, left over, or was not used for ``days``, and nothing that somebody builds.

    One after the other, as the result is asked for; a kernel's manifest goes first, so that whoever is interrupted leaves
    nothing that would be taken for whole.
    """
    for item in items():
        try:
            removed = _pruned(item, days) if _goes(item, examine(item), days) else None
        except (Held, FileNotFoundError):  # since
            continue
        except OSError as error:
            removed = Removal(item, "", 0, str(error))
        if removed is not None:
            yield removed


def _pruned(item: Stored, days: float) -> Removal | None:
    """Looks again, as nobody builds it now: it may have been built since. Raises Held, and OSError."""
    with nullcontext() if item.lock is None else locked(item.lock, limit=0.0):
        why, freed = _goes(item, _examined(item), days), size(item)
        if not why:
            return None
        for path in item.paths:
            remove(path)
        return Removal(item, why, freed)


def _goes(item: Stored, found: Finding, days: float) -> str:
    """Why it has to go, or "" where it stays."""
    if found.state in ("broken", "left over"):
        return f"{found.state}: {found.why}"
    if found.state == "whole" and (unused := _unused(item) / _DAY) >= days:
        return f"not used for {unused:.0f} days"
    return ""


def _unused(item: Stored) -> float:
    """Seconds since its last use; of a kernel, its manifest's time says that."""
    paths = [path for path in item.paths if item.kind != "kernel" or path.suffix == MANIFEST]
    return time.time() - max((path.lstat().st_mtime for path in paths), default=time.time())


def _folders() -> Iterator[Path]:
    for target in registry.names():
        yield settings().cache_dir / target
