"""Attention of a shard's queries with all the keys that they see at once: brought together, used, and given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.parallel.call import Call, Gradients, Segment, together
from fuse.parallel.exchange import like, swap
from fuse.parallel.layout import Extent


@dataclass(frozen=True)
class Held:
    """The operands of keys at positions ``extent``, positions first."""

    extent: Extent
    tensors: tuple[Tensor, ...]

    def of(self, keys: Extent) -> tuple[Tensor, ...]:
        return tuple(x[keys[0] - self.extent[0] : keys[1] - self.extent[0]] for x in self.tensors)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp of this rank's rows, as ``fuse::attention_forward``."""
    held, op = _brought(call), torch.ops.fuse.attention_forward.default
    results = [op(*_part(call, segment, held), call.text, call.target) for segment in call.segments]
    if len(results) == 1:
        out, lse = results[0]
        return out, lse
    out = call.out()
    for segment, (part, _) in zip(call.segments, results, strict=True):
        call.of_rows(out, segment).copy_(part)
    return out, torch.cat([lse for _, lse in results], call.spec.batch)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of this rank's ``wanted`` operands; what other ranks have for its keys is in them."""
    held, op, total = _brought(call), torch.ops.fuse.attention_backward.default, Gradients(call, wanted)
    of_keys = [[torch.zeros_like(h.tensors[n], dtype=total.totals[i].dtype) for n, i in total.numbered_keys] for h in held]
    for segment in call.segments:
        operands, sizes = _part(call, segment, held)
        given, result, statistic = (call.of_rows(x, segment) for x in (grad_out, out, lse))
        grads = op(given, operands, sizes, result, statistic.contiguous(), call.text, call.target, list(wanted))
        which = _place(held, segment.keys)
        for target, grad in zip(of_keys[which], total.add_part(grads, segment), strict=True):
            begin = segment.keys[0] - held[which].extent[0]
            target[begin : begin + grad.shape[0]] += grad
    _give_back(call, held, of_keys, total)
    return total.result()


def _part(call: Call, segment: Segment, held: Sequence[Held]) -> tuple[list[Tensor], list[int]]:
    return call.part(segment, held[_place(held, segment.keys)].of(segment.keys), segment.keys[0])


def _place(held: Sequence[Held], keys: Extent) -> int:
    """Which of ``held`` has ``keys``."""
    return next(i for i, h in enumerate(held) if h.extent[0] <= keys[0] and keys[1] <= h.extent[1])


def _brought(call: Call) -> list[Held]:
    """All keys that this rank's queries see."""
    ranks, me = range(call.ranks.count), call.ranks.rank
    outgoing = [call.rows_of(call.keys, call.pieces(me, r)) if r != me else [] for r in ranks]
    arriving = [sum(p.stop - p.start for p in call.pieces(r, me)) if r != me else 0 for r in ranks]
    incoming = [[like(x, n) for x in call.keys] if n else [] for n in arriving]
    received = swap(call.ranks, outgoing, incoming, call.device)
    received[me] = call.rows_of(call.keys, call.pieces(me, me))
    at: dict[int, tuple[int, tuple[Tensor, ...]]] = {}  # by the first position: where it ends, the rows
    for r in ranks:
        row = 0
        for piece in call.pieces(r, me):
            size = piece.stop - piece.start
            at[piece.start] = piece.stop, tuple(x[row : row + size] for x in received[r])
            row += size
    return [_joined(extent, at) for extent in call.wanted]


def _joined(extent: Extent, at: dict[int, tuple[int, tuple[Tensor, ...]]]) -> Held:
    position, found = extent[0], []
    while position < extent[1]:
        position, tensors = at[position]
        found.append(tensors)
    return Held(extent, tuple(together(parts) for parts in zip(*found, strict=True)))


def _give_back(call: Call, held: Sequence[Held], of_keys: Sequence[Sequence[Tensor]], total: Gradients) -> None:
    """Every rank gets, for its keys, what the queries of all ranks have for them."""
    ranks, me = range(call.ranks.count), call.ranks.rank

    def rows(owner: int) -> list[Tensor]:
        parts: list[list[Tensor]] = [[] for _ in total.keys]
        for piece in call.pieces(owner, me):
            which = _place(held, (piece.start, piece.stop))
            begin = piece.start - held[which].extent[0]
            for x, grad in zip(parts, of_keys[which], strict=True):
                x.append(grad[begin : begin + piece.stop - piece.start])
        return [together(x) for x in parts] if parts and parts[0] else []

    arriving = [sum(p.stop - p.start for p in call.pieces(me, r)) if r != me else 0 for r in ranks]
    likes = [total.totals[i].movedim(dict(call.plan.keys)[i], 0) for i in total.keys]
    incoming = [[like(x, n) for x in likes] if n else [] for n in arriving]
    received = swap(call.ranks, [rows(r) if r != me else [] for r in ranks], incoming, call.device)
    received[me] = rows(me)
    for r in ranks:
        if received[r]:
            total.add_keys(received[r], call.pieces(me, r))
