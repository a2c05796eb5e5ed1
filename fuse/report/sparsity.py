"""How much of the work a mask saves: the share of tiles, blocks of queries × tiles of keys, that no query sees into.

Every tile at once by interval arithmetic: a node of the predicate becomes its smallest and its largest value in each tile, so
that the cost is that of a few operations on (q_len / rows) × (kv_len / keys) numbers. What is read from tensors may be
anything; a share that could be larger with the data at hand is a lower limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fuse.ir.expr import FLOATS, Apply, Const, Expr, Index, Load, Symbol, contains, walk
from fuse.ir.spec import AttentionSpec

_FAR = 2**31  # the ends of integers of which nothing is known; the product of two still fits
Ends = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Coverage:
    """``skipped``: the share of tiles not visited; ``exact``: whether the data cannot make it larger."""

    skipped: float
    exact: bool

    def __str__(self) -> str:
        share = f"{100 * self.skipped:.0f} % of the tiles"
        if self.exact:
            return share
        return f"at least {share}, more depends on the data" if self.skipped else "depends on the data"


@cache
def coverage(spec: AttentionSpec, sizes: tuple[int, ...], rows: int, keys: int) -> Coverage | None:
    """For a call with ``sizes``, the values of ``spec.symbols``; None where the spec has no mask, or nothing to compute."""
    values = dict(zip(spec.symbols, sizes, strict=True))
    if spec.mask is None or not all(values.values()):
        return None
    tiles = _Tiles(values, rows, keys)
    _, may_be_seen = tiles.ends(spec.mask.predicate)
    seen = may_be_seen.expand(tiles.shape).sum().item() / math.prod(tiles.shape)
    return Coverage(1 - seen, not contains(spec.mask.predicate, Load))


@dataclass(frozen=True)
class _Tiles:
    sizes: Mapping[str, int]
    rows: int
    keys: int

    @property
    def shape(self) -> tuple[int, int]:
        return -(-self.sizes["q_len"] // self.rows), -(-self.sizes["kv_len"] // self.keys)

    def ends(self, root: Expr) -> Ends:
        """The smallest and the largest value in each tile; of a truth value, 0 or 1."""
        found: dict[Expr, Ends] = {}
        for n in walk(root):
            found[n] = self._node(n, [found[a] for a in n.args])
        return found[root]

    def _node(self, n: Expr, args: list[Ends]) -> Ends:
        if isinstance(n, Const) and n.dtype not in FLOATS:
            return _both(torch.tensor([[int(n.value)]]))
        if isinstance(n, Symbol):
            return _both(torch.tensor([[self.sizes[n.name]]]))
        if isinstance(n, Index):
            return self._index(n.axis)
        if isinstance(n, Apply) and _is_exact(n):
            return _INTERVALS[n.op](*args)
        zero = torch.zeros(1, 1, dtype=torch.int64)
        return (zero, zero + 1) if n.dtype == "bool" else (zero - _FAR, zero + _FAR)

    def _index(self, axis: str) -> Ends:
        if axis in ("q", "k"):
            size, step = (self.sizes["q_len"], self.rows) if axis == "q" else (self.sizes["kv_len"], self.keys)
            first = torch.arange(0, size, step).reshape((-1, 1) if axis == "q" else (1, -1))
            return first, (first + step - 1).clamp(max=size - 1)
        return torch.tensor([[0]]), torch.tensor([[self.sizes["B" + axis[1:]] - 1]])


def _is_exact(n: Apply) -> bool:
    """Whether the ends of n follow from those of its operands: integers and truth values, no bits, nothing that wraps."""
    logical = n.op in ("and", "or", "not")
    wide = all(x.dtype in ("bool", "int32", "int64") for x in (n, *n.operands))
    return n.op in _INTERVALS and wide and (n.dtype == "bool" or not logical)


def _both(x: Tensor) -> Ends:
    return x, x


def _hull(*corners: Tensor) -> Ends:
    low = high = corners[0]
    for c in corners[1:]:
        low, high = torch.minimum(low, c), torch.maximum(high, c)
    return low, high


def _mul(a: Ends, b: Ends) -> Ends:
    low, high = _hull(*(x * y for x in a for y in b))
    return low.clamp(-_FAR, _FAR), high.clamp(-_FAR, _FAR)


def _floordiv(a: Ends, b: Ends) -> Ends:
    low, high = _hull(*(x // y.clamp(min=1) for x in a for y in b))
    return torch.where(b[0] > 0, low, -_FAR), torch.where(b[0] > 0, high, _FAR)


def _mod(a: Ends, b: Ends) -> Ends:
    """Within one period the remainder grows with the dividend."""
    n = b[0].clamp(min=1)
    positive = b[0] > 0
    one = positive & (b[0] == b[1]) & (a[0] // n == a[1] // n)
    low, high = torch.where(positive, 0, -_FAR), torch.where(positive, b[1] - 1, _FAR)
    return torch.where(one, a[0] % n, low), torch.where(one, a[1] % n, high)


def _abs(a: Ends) -> Ends:
    low, high = _hull(a[0].abs(), a[1].abs())
    return torch.where((a[0] <= 0) & (a[1] >= 0), 0, low), high


def _less(a: Ends, b: Ends) -> Ends:
    return (a[1] < b[0]).long(), (a[0] < b[1]).long()


def _equal(a: Ends, b: Ends) -> Ends:
    same = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return same.long(), ((a[0] <= b[1]) & (b[0] <= a[1])).long()


def _not(a: Ends) -> Ends:
    return 1 - a[1], 1 - a[0]


def _where(c: Ends, a: Ends, b: Ends) -> Ends:
    low, high = _hull(a[0], b[0])[0], _hull(a[1], b[1])[1]
    return (
        torch.where(c[0] == 1, a[0], torch.where(c[1] == 0, b[0], low)),
        torch.where(c[0] == 1, a[1], torch.where(c[1] == 0, b[1], high)),
    )


_INTERVALS: dict[str, Callable[..., Ends]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]), "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "neg": lambda a: (-a[1], -a[0]), "mul": _mul, "floordiv": _floordiv, "mod": _mod, "abs": _abs, "cast": lambda a: a,
    "minimum": lambda a, b: (torch.minimum(a[0], b[0]), torch.minimum(a[1], b[1])),
    "maximum": lambda a, b: (torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])),
    "and": lambda a, b: (a[0] & b[0], a[1] & b[1]), "or": lambda a, b: (a[0] | b[0], a[1] | b[1]), "not": _not,
    "lt": _less, "le": lambda a, b: _not(_less(b, a)), "gt": lambda a, b: _less(b, a), "ge": lambda a, b: _not(_less(a, b)),
    "eq": _equal, "ne": lambda a, b: _not(_equal(a, b)), "where": _where,
}  # fmt: skip
