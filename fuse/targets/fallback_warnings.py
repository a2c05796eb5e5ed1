"""Warnings that plain PyTorch computes what a kernel should: one of each kind in a process."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

from fuse.report.runs import Part, Runs

_SAYS: dict[Part, str] = {
    "forward": "fuse runs attention without its kernels, slowly",
    "backward": "fuse computes gradients of attention without its kernels, slowly and in memory of the size of the scores",
    "weights": "fuse computes attention weights without its kernels, slowly",
    "tile map": "fuse finds the tiles of masks without its kernels, slowly",
}
OVERLAPPING = "calls in which batch indices or positions share parts of a gradient"
_warned: set[tuple[Part, bool]] = set()
_lock = threading.Lock()


def warn_once(part: Part, reason: str, call: bool = False) -> None:
    """``reason`` names the file and what to do. ``call``: it is about calls that a kernel left to the reference."""
    with _lock:
        first = (part, call) not in _warned
        _warned.add((part, call))
    if first:
        warnings.warn(f"{_SAYS[part]}: {reason}", RuntimeWarning, stacklevel=3)


def left_to_reference(runs: Runs, part: Part, calls: str) -> Runs:
    """What is to be said of a kernel that does not take some ``calls``, after a warning."""
    now = replace(runs, why=f"{calls} are left to the reference, as one was")
    warn_once(part, str(now), call=True)
    return now


def reset() -> None:
    """The next warnings are the first again."""
    global _lock
    _lock = threading.Lock()
    _warned.clear()
