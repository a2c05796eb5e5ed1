"""Whether all ranks make the same call: shards of other lengths would have them wait for each other until torch ends that."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

from fuse.errors import NotAShard
from fuse.parallel.call import Call

_REMEDY = "Give every rank its shard of one batch, as fuse.shard_sequence splits it"


def check_alike(call: Call) -> None:
    """Compares the length of the shard and what will travel; every rank of the group has to. Raises NotAShard on each."""
    length, parts = call.sizes[call.spec.batch], 1 + call.plan.balanced
    travels = [(x.dtype, tuple(x.shape[1:])) for x in call.keys], call.needs, call.plan.balanced, call.plan.way
    other = zlib.crc32(repr(travels).encode())
    own = torch.tensor([length, other], device=call.device)
    found = [torch.empty_like(own) for _ in range(call.ranks.count)]
    dist.all_gather(found, own, group=call.ranks.group)
    lengths, others = zip(*(x.tolist() for x in found), strict=True)
    if len(set(lengths)) > 1:
        said = ", ".join(f"{n} on rank {rank}" for rank, n in enumerate(lengths))
        raise NotAShard(what=f"shards of a sequence are as long as each other, these are not: {said}", remedy=f"{_REMEDY}.")
    if length % parts:
        raise NotAShard(what=f"a balanced shard has two halves, this one has {length} positions", remedy=f"{_REMEDY}.")
    if len(set(others)) > 1:
        what = "ranks do not attend alike: their batches have other sizes or dtypes, or they call other layers"
        raise NotAShard(what=what, remedy=f"{_REMEDY}.")
