"""The launch of what lists the tiles that a kernel visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.kernel.names import kernel_name
from fuse.targets.triton.module import made
from fuse.targets.triton.plan import TritonPlan
from fuse.targets.triton.plan_backward import Launch
from fuse.targets.triton.render import mask_axes
from fuse.targets.triton.render_tiles import TILES, is_listed, render_tiles

# Tiles up to which all are visited: a list costs a launch.
UNLISTED = 6
# Tiles that are classified together.
_MANY = 32


class TritonTiles:
    """What a kernel visits whose programs own queries ("q") or keys ("k"), where the mask has more than bounds: lists of tiles,
    or all of them in short calls."""

    def __init__(self, spec: AttentionSpec, owner: str) -> None:
        self._owner = owner
        self._batch, self._axes, self._needed = spec.batch, mask_axes(spec), is_listed(spec, owner)
        if self._needed:
            self.function = made(kernel_name(spec, "tiles"), render_tiles(spec, owner)).function(f"{TILES}_{owner}")

    def of(
        self, given: dict[str, Any], sizes: Sequence[int], plan: TritonPlan | Launch, like: Tensor
    ) -> tuple[dict[str, Tensor], bool]:
        """What the kernel takes beside its own, and whether that are lists; else it may be any tensor.

        given  what comes with the call's operands
        like   a tensor on their device
        """
        q_len, kv_len = sizes[self._batch : self._batch + 2]
        blocks, count = -(-q_len // plan.block_q), -(-kv_len // plan.block_k)
        if self._owner == "k":
            blocks, count = count, blocks
        if not self._needed or count <= UNLISTED:
            return {"tiles": like, "tile_counts": like}, False
        programs = blocks * math.prod(sizes[i] for i in self._axes)
        tiles = torch.empty(programs, count, dtype=torch.int32, device=like.device)
        counts = torch.empty(programs, 2, dtype=torch.int32, device=like.device)
        lists = {"tiles": tiles, "tile_counts": counts}
        self.function[(programs,)](lists | given, BM=plan.block_q, BN=plan.block_k, MANY=_MANY, num_warps=4)
        return lists, True
