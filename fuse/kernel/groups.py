"""Which batch indices add to the same elements of a gradient: they are one program's work, one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuse.ir.grid import Grid
from fuse.ir.spec import AttentionSpec
from fuse.kernel.destinations import Destination


@dataclass(frozen=True)
class BatchGroups:
    """A launch over all batch indices, numbered in row-major order: group i are
    batch_indices[starts[i]] … batch_indices[starts[i + 1] - 1].

    batch_indices, starts  int32
    written                names of the destinations that it writes: different groups write to different elements
    """

    batch_indices: Tensor
    starts: Tensor
    written: frozenset[str]

    @property
    def count(self) -> int:
        return len(self.starts) - 1


def groups_of(
    spec: AttentionSpec, written: Sequence[Destination], sizes: Mapping[str, int], device: torch.device
) -> list[BatchGroups]:
    """As few launches as write all of ``written``, whose coordinates read no tensor."""
    found: list[BatchGroups] = []
    for to in written:
        if to.kind in ("matrix", "dense"):
            _join(found, _places(spec, to, sizes))
    # what has a place for every batch index goes with any launch
    rest = frozenset(to.name for to in written if to.kind not in ("matrix", "dense"))
    if rest:
        first = found[0] if found else _alone(spec, sizes)
        found[:1] = [replace(first, written=first.written | rest)]
    return [BatchGroups(g.batch_indices.to(device), g.starts.to(device), g.written) for g in found]


def _join(found: list[BatchGroups], new: BatchGroups) -> None:
    for i, g in enumerate(found):
        if torch.equal(g.batch_indices, new.batch_indices) and torch.equal(g.starts, new.starts):
            found[i] = replace(g, written=g.written | new.written)
            return
    found.append(new)


def _places(spec: AttentionSpec, to: Destination, sizes: Mapping[str, int]) -> BatchGroups:
    """Groups by where the first element of each batch index is."""
    shape = [sizes[f"B{i}"] for i in range(spec.batch)]
    extents = {f"b{i}": (0, n) for i, n in enumerate(shape)} | dict.fromkeys(("q", "k", "d", "e"), (0, 1))
    grid = Grid.over(extents, sizes)
    places = torch.stack([grid.evaluate(c).expand(*shape, 1, 1, 1, 1).flatten() for c in to.load.coords], 1)
    group = places.unique(dim=0, return_inverse=True)[1]
    return _groups(group, frozenset({to.name}))


def _alone(spec: AttentionSpec, sizes: Mapping[str, int]) -> BatchGroups:
    return _groups(torch.arange(math.prod(sizes[f"B{i}"] for i in range(spec.batch))), frozenset())


def _groups(group: Tensor, written: frozenset[str]) -> BatchGroups:
    """From the number of each batch index's group."""
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), group.bincount().cumsum(0)))
    return BatchGroups(group.argsort(stable=True).int(), starts.int(), written)
