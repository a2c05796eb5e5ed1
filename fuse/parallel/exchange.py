"""Rows of tensors between ranks, as bytes: every dtype alike, all tensors of one exchange together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fuse.torch_private import group_named

Rows = Sequence[Tensor]  # each of any shape, the first dimension counts positions


@dataclass
class Traffic:
    """Bytes that this process has sent to others since the last ``reset``."""

    sent: int = 0

    def reset(self) -> None:
        self.sent = 0


traffic = Traffic()


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group, numbered from 0 on, and which of them this process is."""

    group: Any
    rank: int
    count: int

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(r for r in range(self.count) if r != self.rank)

    def of_process(self, rank: int) -> int:
        """What torch.distributed numbers the process that is ``rank`` in the group."""
        return dist.get_global_rank(self.group, rank)


def ranks_of(name: str) -> Ranks:
    """The group of that name. What fails in it is torch's error."""
    group = group_named(name)
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


@dataclass(frozen=True)
class Shape:
    """Of rows that will arrive."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def like(x: Tensor, rows: int) -> Shape:
    """Of as many ``rows`` as ``x`` has them."""
    return Shape((rows, *x.shape[1:]), x.dtype)


def swap(
    ranks: Ranks, outgoing: Sequence[Rows], incoming: Sequence[Sequence[Shape]], device: torch.device
) -> list[list[Tensor]]:
    """To every rank what ``outgoing`` has for it, from every rank what ``incoming`` says; nothing from a rank to itself.

    One call of all_to_all_single, which every rank of the group has to make.
    """
    given = [sum(x.nbytes for x in rows) for rows in outgoing]
    expected = [sum(shape.bytes for shape in shapes) for shapes in incoming]
    sent, received = (
        _packed([x for rows in outgoing for x in rows], device),
        torch.empty(sum(expected), dtype=torch.uint8, device=device),
    )
    traffic.sent += sent.numel()
    dist.all_to_all_single(received, sent, expected, given, group=ranks.group)
    return [_unpacked(part, shapes) for part, shapes in zip(received.split(expected), incoming, strict=True)]


@dataclass(frozen=True)
class Pending:
    """Rows on their way: ``wait`` gives those that arrive, when they and what was sent at the same time are through."""

    works: tuple[Any, ...]
    sent: Tensor
    received: Tensor
    shapes: tuple[Shape, ...]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return _unpacked(self.received, self.shapes)


def start(ranks: Ranks, to: int, rows: Rows, origin: int, shapes: Sequence[Shape], device: torch.device) -> Pending:
    """Sends ``rows`` to rank ``to`` and receives what has ``shapes`` from rank ``origin``; where either is nothing, nothing is
    sent."""
    sent, size = _packed(rows, device), sum(shape.bytes for shape in shapes)
    received = torch.empty(size, dtype=torch.uint8, device=device)
    calls = [(dist.isend, sent, to), (dist.irecv, received, origin)]
    ops = [dist.P2POp(call, x, ranks.of_process(peer), ranks.group) for call, x, peer in calls if x.numel()]
    traffic.sent += sent.numel()
    works = dist.batch_isend_irecv(ops) if ops else ()
    return Pending(tuple(works), sent, received, tuple(shapes))


def _packed(rows: Rows, device: torch.device) -> Tensor:
    flat = [x.contiguous().flatten().view(torch.uint8) for x in rows]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)


def _unpacked(received: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """A copy where a tensor would begin between two of its elements."""
    ends = list(accumulate((shape.bytes for shape in shapes), initial=0))
    parts = (received[a:b] for a, b in zip(ends, ends[1:], strict=False))
    return [_aligned(x, shape.dtype).view(shape.dtype).reshape(shape.sizes) for x, shape in zip(parts, shapes, strict=True)]


def _aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.storage_offset() % dtype.itemsize == 0 else x.clone()
