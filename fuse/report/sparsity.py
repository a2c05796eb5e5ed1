"""How much of the work a mask saves: the share of tiles, blocks of queries × tiles of keys, that no query sees into.

Every tile at once by interval arithmetic (``fuse.ir.interval``): a node of the predicate becomes its smallest and its largest
value in each tile, so that the cost is that of a few operations on (q_len / rows) × (kv_len / keys) numbers. What is read from
tensors may be anything; a share that could be larger with the data at hand is a lower limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from fuse.ir.expr import Expr, Index, Load, contains
from fuse.ir.interval import Range, as_tensor, in_call, in_dtype, range_of
from fuse.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Coverage:
    """
    skipped  the share of tiles not visited
    exact    whether the data cannot make it larger
    tiles    how many there are
    rows     queries of a tile
    keys     of a tile
    """

    skipped: float
    exact: bool
    tiles: int = field(default=0, compare=False)
    rows: int = field(default=0, compare=False)
    keys: int = field(default=0, compare=False)

    def __str__(self) -> str:
        share = f"{100 * self.skipped:.0f} % of the tiles"
        if self.exact and not self.skipped:
            return f"nothing, {self._why_nothing}"
        if self.exact:
            return share
        return f"at least {share}, more depends on the data" if self.skipped else "depends on the data"

    @property
    def _why_nothing(self) -> str:
        return "all of it is one tile" if self.tiles == 1 else f"no tile of {self.rows} × {self.keys} is hidden as a whole"


@cache
def coverage(spec: AttentionSpec, sizes: tuple[int, ...], rows: int, keys: int) -> Coverage | None:
    """For a call with ``sizes``, the values of ``spec.symbols``; None where the spec has no mask, or nothing to compute."""
    values = dict(zip(spec.symbols, sizes, strict=True))
    if spec.mask is None or not all(values.values()):
        return None
    tiles = _Tiles(values, rows, keys)
    may_be_seen = as_tensor(range_of(spec.mask.predicate, tiles.leaf).high)
    seen = may_be_seen.expand(tiles.shape).sum().item() / math.prod(tiles.shape)
    return Coverage(1 - seen, not contains(spec.mask.predicate, Load), math.prod(tiles.shape), rows, keys)


@dataclass(frozen=True)
class _Tiles:
    sizes: Mapping[str, int]
    rows: int
    keys: int

    @property
    def shape(self) -> tuple[int, int]:
        return -(-self.sizes["q_len"] // self.rows), -(-self.sizes["kv_len"] // self.keys)

    def leaf(self, n: Expr) -> Range:
        """What it is in each tile, as tensors that expand to the shape of all tiles."""
        found = in_call(self.sizes)(n)
        if not isinstance(n, Index) or n.axis not in ("q", "k"):
            return in_dtype(Range(as_tensor(found.low), as_tensor(found.high), found.nan), n.dtype)
        step, along = (self.rows, (-1, 1)) if n.axis == "q" else (self.keys, (1, -1))
        first = torch.arange(0, found.high + 1, step, dtype=torch.float64).reshape(along)
        return Range(first, (first + step - 1).clamp(max=found.high))
