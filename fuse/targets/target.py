"""What a target is: a way to run specs, of which the rest knows nothing else."""

from __future__ import annotations

from typing import Protocol

import torch

from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.targets.protocols import Backward, Kernel, MapKernel


class Target(Protocol):
    """
    name       as options name it; also the folder of its kernels in the cache
    devices    the types of devices whose tensors its kernels take; None: all
    generated  it has kernels of its own; else the reference is what was asked for
    suffix     of its sources, if it is
    tunable    its kernels have plans that can be measured
    late       it compiles when a kernel is launched first, so that calls are worth warming up
    """

    @property
    def name(self) -> str: ...

    @property
    def devices(self) -> frozenset[str] | None: ...

    @property
    def generated(self) -> bool: ...

    @property
    def suffix(self) -> str: ...

    @property
    def tunable(self) -> bool: ...

    @property
    def late(self) -> bool: ...

    def by_itself(self, device: torch.device) -> bool:
        """Whether "auto" chooses it for tensors on ``device``, of a type that it has kernels for."""
        ...

    def toolchain(self) -> str:
        """What its kernels depend on beside their source and the versions of torch and Triton: a compiler, say."""
        ...

    def lse_dtype(self, spec: AttentionSpec) -> str:
        """What the log-sum-exp of rows is kept in for backward."""
        ...

    def forward(self, spec: AttentionSpec) -> Kernel:
        """Raises BuildFailed, and whatever else there may be: the reference then stands in."""
        ...

    def backward(self, of: Gradient) -> Backward:
        """As ``forward``; also raises Unsupported."""
        ...

    def tile_map(self, spec: TileMap) -> MapKernel:
        """As ``forward``."""
        ...

    def tile_size(self, spec: AttentionSpec) -> tuple[int, int] | None:
        """Queries and keys of what is skipped together on this machine; None where nothing is."""
        ...
