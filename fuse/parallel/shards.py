"""A batch as this rank's shard of its sequences, and what ranks have computed as whole sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fuse.errors import NotAShard
from fuse.parallel.layout import Layout
from fuse.parallel.option import ContextParallel, process_group
from fuse.torch_private import maybe_mark_dynamic

IGNORED = -100  # a label without a loss, as torch.nn.functional.cross_entropy has it
_TEXTS = ("input_ids", "inputs_embeds")  # what has the positions, whatever else there is


@overload
def shard_sequence(batch: Tensor, mesh: Any, *, balanced: bool = False, dim: int = 1) -> Tensor: ...
@overload
def shard_sequence(batch: Mapping[str, Any], mesh: Any, *, balanced: bool = False, dim: int = 1) -> dict[str, Any]: ...
def shard_sequence(batch: Any, mesh: Any, *, balanced: bool = False, dim: int = 1) -> Any:
    """This rank's shard of ``batch``, which every rank has whole, for a model under ``options={"context_parallel": mesh}``.

    batch     a tensor, or tensors by name as a model of transformers takes them, with positions in dimension ``dim``. Of names:
              ``position_ids`` are added where there are ``input_ids`` or ``inputs_embeds`` without any, since a model would
              number the positions of each shard from 0 on; ``shift_labels``, each position's next label, where there are
              ``labels``, since the label of a shard's last position lies on another rank. What has no dimension ``dim``, or
              another length there than these (than the first, where there are none), is handed on
    mesh      as the option takes it; of a fuse.ContextParallel, ``balanced`` is its own
    balanced  gives each rank a part of the head and one of the tail of the sequence, so that all have as much to do under a
              causal mask. The option has to say so, too: fuse.ContextParallel(mesh, balanced=True)

    The dimension is marked as one whose size changes, as torch._dynamo.maybe_mark_dynamic does: graphs have it as a symbol.
    Raises NotAShard where the length is no multiple of the ranks, or of twice as many if balanced.
    """
    across = _across(mesh, balanced)
    if isinstance(batch, Tensor):
        return _shard(batch, across, dim, "the tensor")
    named = _with_places(dict(batch), dim)
    length = next((named[name].shape[dim] for name in (*_TEXTS, *named) if _has(named.get(name), dim)), None)
    return {name: _shard(x, across, dim, name) if _has(x, dim) and x.shape[dim] == length else x for name, x in named.items()}


def gather_sequence(shard: Tensor, mesh: Any, *, balanced: bool = False, dim: int = 1) -> Tensor:
    """The whole of what every rank has a shard of, positions in their order; without a gradient. The reverse of shard_sequence.

    shard  of the same shape on every rank; ``mesh``, ``balanced``, ``dim``: as of shard_sequence
    """
    across = _across(mesh, balanced)
    group, layout = process_group(across.group), across.layout
    own = shard.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(layout.ranks)]
    dist.all_gather(parts, own, group=group)
    length = shard.shape[dim] * layout.ranks
    at: list[tuple[int, Tensor]] = []
    for rank, part in enumerate(parts):
        segments = layout.segments(rank, length)
        at += zip((start for start, _ in segments), part.chunk(len(segments), dim), strict=True)
    return torch.cat([x for _, x in sorted(at, key=lambda found: found[0])], dim)


def _across(mesh: Any, balanced: bool) -> ContextParallel:
    return mesh if isinstance(mesh, ContextParallel) else ContextParallel(mesh, balanced)


def _has(x: Any, dim: int) -> bool:
    return isinstance(x, Tensor) and -x.dim() <= dim < x.dim()


def _with_places(batch: dict[str, Any], dim: int) -> dict[str, Any]:
    given = next((batch[name] for name in _TEXTS if _has(batch.get(name), dim)), None)
    if given is not None and "position_ids" not in batch:
        batch["position_ids"] = torch.arange(given.shape[dim], device=given.device).expand(given.shape[0], -1)
    labels: Any = batch.get("labels")
    if _has(labels, dim) and "shift_labels" not in batch:
        after = labels.new_full(labels.narrow(dim, 0, 1).shape, IGNORED)
        batch["shift_labels"] = torch.cat((labels.narrow(dim, 1, labels.shape[dim] - 1), after), dim)
    return batch


def _shard(x: Tensor, across: ContextParallel, dim: int, name: str) -> Tensor:
    layout, length = across.layout, x.shape[dim]
    if length % layout.divisor:
        parts = " in two parts each" if layout.balanced else ""
        what = f"{name} has {length} positions, which {layout.ranks} ranks cannot share{parts}"
        raise NotAShard(what=what, remedy=f"Pad them to a multiple of {layout.divisor}.")
    shard = _rows(x, layout, dist.get_rank(process_group(across.group)), dim)
    maybe_mark_dynamic(shard, dim % x.dim())
    return shard


def _rows(x: Tensor, layout: Layout, rank: int, dim: int) -> Tensor:
    """A copy: what is whole need not be kept."""
    return torch.cat([x.narrow(dim, a, b - a) for a, b in layout.segments(rank, x.shape[dim])], dim).contiguous()
