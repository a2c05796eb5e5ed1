"""One call of ``fuse::context_attention`` on this rank: what all ways of computing it share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fuse.errors import NotAShard
from fuse.ir.spec import AttentionSpec
from fuse.ops.attention import parsed
from fuse.parallel.exchange import Ranks, ranks_of
from fuse.parallel.layout import Extent, Layout, Piece, joined, pieces
from fuse.parallel.needs import merges, needs
from fuse.parallel.plan import Plan


@dataclass(frozen=True)
class Segment:
    """Queries of this rank that lie behind one another in the sequence: ``rows`` of its tensors, from position ``start`` on;
    ``keys``: what they see."""

    rows: slice
    start: int
    keys: Extent

    @property
    def length(self) -> int:
        length: int = self.rows.stop - self.rows.start
        return length


@dataclass(frozen=True)
class Call:
    """``operands``: of this rank; ``sizes``: of the attention of its shard by itself; ``text``: the spec's."""

    operands: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    text: str
    target: str
    plan: Plan

    @cached_property
    def spec(self) -> AttentionSpec:
        return parsed(self.text)

    @cached_property
    def ranks(self) -> Ranks:
        return ranks_of(self.plan.group)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.ranks.count, self.plan.balanced)

    @property
    def device(self) -> torch.device:
        return self.operands[0].device

    @property
    def whole(self) -> int:
        """The length of the sequence."""
        return self.sizes[self.spec.batch] * self.ranks.count

    @property
    def merges(self) -> bool:
        return merges(self.spec, self.sizes, self.layout)

    @cached_property
    def needs(self) -> tuple[tuple[Extent, ...], ...]:
        return needs(self.spec, self.sizes, self.layout)

    @cached_property
    def wanted(self) -> tuple[Extent, ...]:
        """The keys that this rank's queries see."""
        return joined(self.needs[self.ranks.rank])

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        found, row = [], 0
        extents = self.layout.segments(self.ranks.rank, self.whole)
        for (start, stop), keys in zip(extents, self.needs[self.ranks.rank], strict=True):
            found.append(Segment(slice(row, row + stop - start), start, keys))
            row += stop - start
        return tuple(found)

    def check_positions(self) -> None:
        """Raises NotAShard where a tensor has not one place for each position of the shard: not all were proved to."""
        length = self.sizes[self.spec.batch]
        for i, dim in (*self.plan.queries, *self.plan.keys):
            if (n := self.operands[i].shape[dim]) != length:
                what = f"a tensor of {n} positions is read in the attention of a shard of {length}"
                raise NotAShard(what=what, remedy="Give each rank its shard of it, as fuse.shard_sequence makes it.")

    @cached_property
    def keys(self) -> tuple[Tensor, ...]:
        """The operands of keys, positions first."""
        return tuple(self.operands[i].movedim(dim, 0) for i, dim in self.plan.keys)

    def pieces(self, owner: int, user: int) -> tuple[Piece, ...]:
        """Which rows of the keys of rank ``owner`` the queries of rank ``user`` see."""
        return pieces(self.layout.segments(owner, self.whole), joined(self.needs[user]))

    def rows_of(self, tensors: Sequence[Tensor], found: Sequence[Piece]) -> list[Tensor]:
        """``found`` of each of ``tensors``, whose rows lie as this rank's positions do; nothing of each where it is nothing."""
        return [together([x[piece.rows] for piece in found]) for x in tensors] if found else []

    def part(self, segment: Segment, keys: Sequence[Tensor], first: int) -> tuple[list[Tensor], list[int]]:
        """Operands and sizes of the attention of a segment's queries to ``keys``, which begin at position ``first``."""
        operands = list(self.operands)
        for i, dim in self.plan.queries:
            operands[i] = operands[i].narrow(dim, segment.rows.start, segment.length)
        for (i, dim), rows in zip(self.plan.keys, keys, strict=True):
            operands[i] = rows.movedim(0, dim)
        batch = self.spec.batch
        extra = self.sizes[batch + 2 : -3]
        count = keys[0].shape[0]
        return operands, [*self.sizes[:batch], segment.length, count, *extra, segment.start, first, self.whole]

    def of_rows(self, x: Tensor, segment: Segment) -> Tensor:
        """A segment's part of a result or of the log-sum-exp of its rows."""
        return x.narrow(self.spec.batch, segment.rows.start, segment.length)

    def out(self) -> Tensor:
        """Memory for the result."""
        shape, strides = self.spec.out_shape(self.sizes), self.spec.out_strides(self.sizes)
        return torch.empty_strided(shape, strides, dtype=getattr(torch, self.spec.out_dtype), device=self.device)


def together(parts: Sequence[Tensor]) -> Tensor:
    """One behind another; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Gradients:
    """Gradients of one rank's ``wanted`` operands as they add up, in float32 where an operand is of a half."""

    def __init__(self, call: Call, wanted: Sequence[bool]) -> None:
        self.call = call
        self.wanted = tuple(wanted)
        self.totals = {i: torch.zeros_like(x, dtype=_sum_dtype(x)) for i, x in enumerate(call.operands) if wanted[i]}

    @property
    def numbered_keys(self) -> list[tuple[int, int]]:
        """The wanted operands of keys, each behind its number among all of those."""
        return [(n, i) for n, (i, _) in enumerate(self.call.plan.keys) if self.wanted[i]]

    @property
    def keys(self) -> list[int]:
        """The wanted operands of keys."""
        return [i for _, i in self.numbered_keys]

    def add_part(self, grads: Sequence[Tensor], segment: Segment) -> list[Tensor]:
        """Takes what ``part`` of a segment gives, one for each wanted operand; hands back those of keys, positions first."""
        given = dict(zip((i for i, w in enumerate(self.wanted) if w), grads, strict=True))
        keys = dict(self.call.plan.keys)
        queries = dict(self.call.plan.queries)
        for i in given.keys() - keys.keys():
            total = self.totals[i]
            (total.narrow(queries[i], segment.rows.start, segment.length) if i in queries else total).add_(given[i])
        return [given[i].movedim(keys[i], 0) for i in self.keys]

    def add_keys(self, rows: Sequence[Tensor], found: Sequence[Piece]) -> None:
        """Adds what another rank, or this one, has for keys of this rank: ``rows`` lie as ``found`` do, one behind another."""
        dims = dict(self.call.plan.keys)
        for i, x in zip(self.keys, rows, strict=True):
            total, row = self.totals[i].movedim(dims[i], 0), 0
            for piece in found:
                size = piece.stop - piece.start
                total[piece.rows] += x[row : row + size]
                row += size

    def result(self) -> list[Tensor]:
        return [total.to(self.call.operands[i].dtype) for i, total in self.totals.items()]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
