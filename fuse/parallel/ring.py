"""Attention of a shard's queries in parts, a rank's keys at a time, merged by the log-sum-exp of their rows, or added up where
there is no softmax.

While a part is computed the keys of the next one arrive (Liu, Zaharia, Abbeel 2023, Ring Attention, section 3), each from the
rank that has them, and only those that are seen. With the result and the log-sum-exp of the whole row, the gradients of a part
are those that its keys have in the whole: P = exp(score - lse), see fuse.ir.gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.parallel.call import Call, Gradients, Segment
from fuse.parallel.exchange import Pending, Shape, like, start
from fuse.parallel.layout import Extent, Piece, common


@dataclass(frozen=True)
class Part:
    """Keys of one rank that lie behind one another: ``rows`` of what has arrived, positions first."""

    extent: Extent
    rows: slice
    tensors: tuple[Tensor, ...]

    def of(self, segment: Segment) -> tuple[Extent, tuple[Tensor, ...]] | None:
        """What of it the queries of a segment see, and where that lies."""
        begin, end = common(self.extent, segment.keys)
        shift = self.rows.start - self.extent[0]
        return ((begin, end), tuple(x[begin + shift : end + shift] for x in self.tensors)) if begin < end else None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp of this rank's rows, as ``fuse::attention_forward``."""
    text = _wide(call.text)
    merged = [(segment, _Merged(call.spec)) for segment in call.segments]
    for parts in _arriving(call):
        for part in parts:
            for segment, rows in merged:
                if (seen := part.of(segment)) is not None:
                    (first, _), keys = seen
                    rows.add(*torch.ops.fuse.attention_forward.default(*call.part(segment, keys, first), text, call.target))
    out = call.out()
    for segment, rows in merged:
        call.of_rows(out, segment).copy_(rows.out)
    return out, torch.cat([rows.lse for _, rows in merged], call.spec.batch)


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of this rank's ``wanted`` operands; those of keys go to their owner while the next ones are computed."""
    total, ranks = Gradients(call, wanted), call.ranks
    on_their_way: Pending | None = None
    for step, parts in enumerate(_arriving(call)):
        owner, user = (ranks.rank - step) % ranks.count, (ranks.rank + step) % ranks.count  # of these keys; of this rank's
        grads = _of_parts(call, parts, grad_out, out, lse, total)
        if step == 0:
            _add(total, grads, call.pieces(owner, ranks.rank))
            continue
        _arrived(call, total, on_their_way, step - 1)
        on_their_way = start(ranks, owner, grads, user, _shapes(call, total, user), call.device)
    _arrived(call, total, on_their_way, ranks.count - 1)
    return total.result()


def _shapes(call: Call, total: Gradients, user: int) -> list[Shape]:
    """Of what rank ``user`` has for this rank's keys."""
    count = sum(piece.stop - piece.start for piece in call.pieces(call.ranks.rank, user))
    return [like(total.totals[i].movedim(dim, 0), count) for i, dim in call.plan.keys if i in total.totals] if count else []


def _arrived(call: Call, total: Gradients, pending: Pending | None, step: int) -> None:
    """Adds what the rank ``step`` after this one has sent for this rank's keys."""
    if pending is not None:
        _add(total, pending.wait(), call.pieces(call.ranks.rank, (call.ranks.rank + step) % call.ranks.count))


def _add(total: Gradients, rows: Sequence[Tensor], found: Sequence[Piece]) -> None:
    if rows:
        total.add_keys(rows, found)


def _of_parts(call: Call, parts: Sequence[Part], grad_out: Tensor, out: Tensor, lse: Tensor, total: Gradients) -> list[Tensor]:
    """Gradients of the keys of ``parts``, as their rows lie; what belongs to this rank's queries is added to ``total``."""
    if not parts:
        return []
    grads = [torch.zeros_like(parts[0].tensors[n], dtype=total.totals[i].dtype) for n, i in total.numbered_keys]
    for part in parts:
        for segment in call.segments:
            if (seen := part.of(segment)) is None:
                continue
            (first, _), keys = seen
            given, result, statistic = (call.of_rows(x, segment) for x in (grad_out, out, lse))
            operands, sizes = call.part(segment, keys, first)
            op, of = torch.ops.fuse.attention_backward.default, list(total.wanted)
            found = op(given, operands, sizes, result, statistic.contiguous(), call.text, call.target, of)
            begin = first - part.extent[0] + part.rows.start
            for x, grad in zip(grads, total.add_part(found, segment), strict=True):
                x[begin : begin + grad.shape[0]] += grad
    return grads


def _arriving(call: Call) -> Iterator[list[Part]]:
    """The keys of each rank, this one's first, then those of the ranks before it; the next are on their way meanwhile."""
    ranks, me = call.ranks, call.ranks.rank
    pending: Pending | None = None
    for step in range(ranks.count):
        owner = (me - step) % ranks.count
        rows = call.rows_of(call.keys, call.pieces(me, me)) if pending is None else pending.wait()
        if step + 1 < ranks.count:
            pending = _started(call, (me + step + 1) % ranks.count, (me - step - 1) % ranks.count)
        yield _parts(rows, call.pieces(owner, me))


def _started(call: Call, user: int, owner: int) -> Pending:
    me = call.ranks.rank
    count = sum(piece.stop - piece.start for piece in call.pieces(owner, me))
    shapes = [like(x, count) for x in call.keys] if count else []
    return start(call.ranks, user, call.rows_of(call.keys, call.pieces(me, user)), owner, shapes, call.device)


def _parts(rows: Sequence[Tensor], found: Sequence[Piece]) -> list[Part]:
    parts, row = [], 0
    for piece in found:
        size = piece.stop - piece.start
        parts.append(Part((piece.start, piece.stop), slice(row, row + size), tuple(rows)))
        row += size
    return parts


@cache
def _wide(text: str) -> str:
    """The spec with results of parts in float32: those of a half would be rounded once for each part."""
    spec = AttentionSpec.from_json(text)
    return text if spec.out_dtype not in ("bfloat16", "float16") else dataclasses.replace(spec, out_dtype="float32").to_json()


class _Merged:
    """Rows of results of several parts of the keys as those of all."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """``lse`` as kernels keep it: infinite in a row that sees nothing of this part. Both are written."""
        if not self.spec.softmax:
            self._out, self._lse = out if self._out is None else self._out.add_(out), lse
            return
        empty = (lse == math.inf) & ~out[..., 0].isnan() if self.spec.empty_row == "zero" else lse == -math.inf
        lse.masked_fill_(empty, -math.inf)
        out.masked_fill_(empty[..., None], 0)
        if self._out is None or self._lse is None:
            self._out, self._lse = out, lse
            return
        both = torch.logaddexp(self._lse, lse)
        before, new = ((x - both).exp().masked_fill(x == -math.inf, 0)[..., None] for x in (self._lse, lse))
        self._out.mul_(before).add_(out.mul_(new))
        self._lse = both

    @property
    def lse(self) -> Tensor:
        assert self._lse is not None
        if not self.spec.softmax:
            return self._lse
        return self._lse if self.spec.empty_row == "nan" else self._lse.masked_fill(self._lse == -math.inf, math.inf)

    @property
    def out(self) -> Tensor:
        """NaN, or zero, in a row that sees nothing of any part."""
        assert self._out is not None and self._lse is not None
        if not self.spec.softmax:
            return self._out
        nothing = math.nan if self.spec.empty_row == "nan" else 0.0
        return self._out.masked_fill_((self._lse == -math.inf)[..., None], nothing)
