"""Which tiles a program visits, and in which order: what ``templates/triton/walk.py.jinja`` writes for every kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """An end of a walk, "begin", "end", "full_begin" or "full_end": the statements that it needs, and its value.

    beyond  of keys that a program owns: the end is the first query ``middle`` for which the value is beyond this key
    """

    name: str
    lines: Sequence[str]
    result: str
    beyond: str = ""


@dataclass(frozen=True)
class Walk:
    """The tiles of the positions ``at``, "q" or "k", that a program visits.

    limits          what the mask's bounds tell
    listed          tiles are listed beforehand (fuse.targets.triton.render_tiles), unless a call is short
    starts_partial  tiles before those that are seen entirely
    ends_partial    tiles behind them; if there are none, the last one may still be cut short
    full            tiles that are seen entirely have a loop of their own; ``full_if``: under this condition only
    shown           whether queries may see a key, where that is the same for all of them
    ahead           addresses are computed before the loops
    reduced         the first position is no multiple of the tile's size, and found by a reduction
    """

    at: str
    limits: Sequence[Limit] = ()
    listed: bool = False
    starts_partial: bool = False
    ends_partial: bool = True
    full: bool = True
    full_if: str = ""
    shown: str | None = None
    ahead: bool = False
    reduced: bool = False

    @property
    def start(self) -> str:
        return f"{self.at}0"

    @property
    def size(self) -> str:
        return "BM" if self.at == "q" else "BN"

    @property
    def length(self) -> str:
        return "q_len" if self.at == "q" else "kv_len"

    @property
    def needed(self) -> list[Limit]:
        """The limits that the loops ask for."""
        return [limit for limit in self.limits if self.full or not limit.name.startswith("full_")]

    def aligned(self, position: str) -> str:
        """The last begin of a tile that is not behind ``position``."""
        return position if self.reduced else f"{position} // {self.size} * {self.size}"
