"""``torch.nn.attention.varlen``, sequences packed one after the other, as the products that its operator stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fuse.passes.read.graph import Calls
from fuse.report.reasons import Declined, UnreadOperator
from fuse.torch_private import OpOverload, OpOverloadPacket, packet_name, safe_softmax, schema

VARLEN = "_varlen_attn"
VARLEN_OUT = "_varlen_attn_out"
# Bounds of lengths, a permission, an order of sums, and which of torch's kernels computes it
_NO_MATTER = ("max_q", "max_k", "enable_gqa", "num_splits", "backend")
VARLEN_LSE: Calls = (
    (torch.ops.aten.nan_to_num.default, (math.nan, math.inf, math.inf)),  # infinity where nothing is seen
    (torch.ops.aten.to.dtype, (torch.float32,)),
    (torch.ops.aten.transpose.int, (0, 1)),
)


def is_varlen(node: Node, name: str = VARLEN) -> bool:
    target = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    return isinstance(target, OpOverloadPacket) and packet_name(target) == f"torch_attn::{name}"


def by_name(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``operator``: torch 2.11 has fewer of them than 2.13."""
    declared = schema(operator if isinstance(operator, OpOverload) else operator.default).arguments
    return dict(zip((a.name for a in declared), args, strict=False)) | dict(kwargs)


def varlen_as_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """query (Tq, Hq, E), key (Tk, Hkv, E), value (Tk, Hkv, E) → result (Tq, Hq, E), log-sum-exp (Hq, Tq) in float32.

    cu_seq_q, cu_seq_k (N + 1): where sequences begin; seqused_k (N): how many of its keys each has; block_table (N, P): the
    pages of each in key and value, which are (pages, L, Hkv, E) then. An argument that is not known here is declined.

    Source: the documentation of ``torch.nn.attention.varlen.varlen_attn``, and FlashAttention 2 behind it: windows are aligned
    at the last query and the last key of a sequence, a query that sees nothing gives zeros and a log-sum-exp of infinity. So
    does here a query behind the last sequence, of which nothing is said there.
    """
    for name, given in others.items():
        if name not in _NO_MATTER and given is not None and given is not False:
            raise Declined(UnreadOperator(f"varlen_attn with {name}"))
    with torch.autocast(query.device.type, enabled=False):
        queries = _Sequences.packed(cu_seq_q.long())
        if block_table is not None:
            key, value, keys = _paged(key, value, block_table)
        elif cu_seq_k is not None:
            keys = _Sequences.packed(cu_seq_k.long())
        else:
            raise Declined(UnreadOperator("varlen_attn without cu_seq_k"))
        if seqused_k is not None:  # what lies behind the used keys may be anything, and zero times NaN is NaN
            keys = replace(keys, length=F.pad(seqused_k.long(), (0, 1)))
            value = torch.where(keys.held(key.shape[0])[:, None, None], value, 0)
        elif block_table is not None:
            raise Declined(UnreadOperator("varlen_attn with block_table and without seqused_k"))
        left, right = (None if n < 0 else n for n in window_size or (-1, -1))
        right = 0 if is_causal else right
        seen = _seen_in_place if cu_seq_q is cu_seq_k and seqused_k is None else _seen
        visible = seen(queries, keys, (query.shape[0], key.shape[0]), left, right)
        return _attend(query, key, value, visible, scale)


@dataclass(frozen=True)
class _Sequences:
    """Where each begins and how long it is, int64, and behind the last one of length 0: (N + 1,)."""

    begin: Tensor
    length: Tensor

    @staticmethod
    def packed(cu_seq: Tensor) -> _Sequences:
        return _Sequences(cu_seq, torch.cat((cu_seq, cu_seq[-1:]))[1:] - cu_seq)

    def number(self, count: int) -> Tensor:
        """Of the sequence that each of ``count`` positions lies in; N behind the last."""
        return torch.searchsorted(self.begin, torch.arange(count, device=self.begin.device), right=True) - 1

    def end(self, number: Tensor) -> Tensor:
        return self.begin[number] + self.length[number]

    def held(self, count: int) -> Tensor:
        """Which of ``count`` positions belong to a sequence."""
        return torch.arange(count, device=self.begin.device) < self.end(self.number(count))


def _paged(key: Tensor, value: Tensor, table: Tensor) -> tuple[Tensor, Tensor, _Sequences]:
    """Keys and values as if they were packed: all pages that a sequence has room for, one sequence after the other."""
    pages = table.clamp(0, key.shape[0] - 1)  # what stands behind the pages in use may be anything
    begin = torch.arange(table.shape[0] + 1, device=table.device) * (table.shape[1] * key.shape[1])
    return key[pages].flatten(0, 2), value[pages].flatten(0, 2), _Sequences.packed(begin)


def _seen_in_place(
    queries: _Sequences, keys: _Sequences, counts: tuple[int, int], left: int | None, right: int | None
) -> Tensor:
    """Where queries and keys are at the same places, windows are of positions alone."""
    q, k = (torch.arange(n, device=keys.begin.device) for n in counts)
    number = queries.number(counts[0])
    # Behind the last sequence nothing is seen, even without an end
    visible = _rising(torch.where(number < keys.begin.shape[0] - 1, keys.begin[number], counts[1])) <= k
    if right is not None:
        visible = visible & (k <= q[:, None] + right)
    if right != 0:  # else the last key that a query sees is its own
        visible = visible & (k < _rising(keys.end(number)))
    return visible if left is None else visible & (k >= q[:, None] - left)


def _seen(queries: _Sequences, keys: _Sequences, counts: tuple[int, int], left: int | None, right: int | None) -> Tensor:
    """Between two places of each query, in tables."""
    q, k = (torch.arange(n, device=keys.begin.device) for n in counts)
    number = queries.number(counts[0])
    begin, end = keys.begin[number], keys.end(number)
    last = q + end - queries.end(number)  # the key that is aligned with a query
    begin = begin if left is None else torch.maximum(begin, last - left)
    end = end if right is None else torch.minimum(end, last + right + 1)
    return (_rising(begin) <= k) & (k < _rising(end))


def _rising(limit: Tensor) -> Tensor:
    """A limit of each query, (Tq, 1): it never decreases, and running maxima say so to the passes, which make it a bound."""
    return limit.cummax(0).values[:, None]


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    score = torch.where(visible, q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale), -math.inf)
    lse = score.float().logsumexp(-1)
    out = safe_softmax(score, -1) @ v
    return out.transpose(0, 1), lse.masked_fill(lse == -math.inf, math.inf)
