"""Warnings that plain PyTorch computes what a kernel should: one of each kind in a process."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

from fuse.runs import Part, Runs

_SAYS: dict[Part, str] = {
    "forward": "fuse runs attention without its kernels, slowly",
    "backward": "fuse computes gradients of attention without its kernels, slowly and in memory of the size of the scores",
    "tile map": "fuse finds the tiles of masks without its kernels, slowly",
}
_told: set[tuple[Part, bool]] = set()
_lock = threading.Lock()


def warn(part: Part, reason: str, call: bool = False) -> None:
    """``reason`` names the file and what to do. ``call``: it is about calls that a kernel left to the reference."""
    with _lock:
        first = (part, call) not in _told
        _told.add((part, call))
    if first:
        warnings.warn(f"{_SAYS[part]}: {reason}", RuntimeWarning, stacklevel=3)


def left(runs: Runs, part: Part, calls: str) -> Runs:
    """What is to be said of a kernel that does not take some ``calls``, after a warning."""
    left = replace(runs, why=f"{calls} are left to the reference, as one was")
    warn(part, str(left), call=True)
    return left


def reset() -> None:
    """The next warnings are the first again."""
    global _lock
    _lock = threading.Lock()
    _told.clear()
