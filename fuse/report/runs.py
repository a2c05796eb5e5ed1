"""What computes a site: a value that the runtime gives, and that reports print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["forward", "backward", "tile map", "weights"]
_LINES = 3  # of a compiler's errors in a table
By = Literal["kernel", "edited kernel", "reference", "being built"]


@dataclass(frozen=True)
class Runs:
    """What computes one part of a site: its result, its gradients, the map of its mask's tiles, or weights beside it.

    by    a generated kernel, one that somebody edited (FUSE_DUMP), plain PyTorch, or what cannot be said before it is built
    file  the source of a kernel, or the file that was edited; None of the others
    why   why the reference; of a kernel, which calls it left to the reference; "" where there is nothing to say
    """

    by: By
    file: Path | None = None
    why: str = ""

    def __str__(self) -> str:
        what = self.by if self.file is None else f"{self.by} {self.file}"
        return f"{what}: {self.why}" if self.why else what


def brief(text: str) -> str:
    """The first lines of what a compiler had to say."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[:_LINES]) + (" | …" if len(lines) > _LINES else "")
