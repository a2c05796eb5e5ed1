"""The target "triton": kernels for GPUs. Triton is imported when the first one is made: it is not there for every platform."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.targets.cache import BuildFailed
from fuse.targets.fallback import KernelOrElse, OrElse
from fuse.targets.protocols import Backward, Kernel, MapKernel
from fuse.targets.standin import ReferenceBackward, ReferenceKernel, ReferenceTileMap
from fuse.targets.triton import NAME, SUFFIX
from fuse.targets.triton.plan import ARCHITECTURES, plan_triton

# For tests, Triton's interpreter takes tensors on the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_GPU = frozenset({"cuda"})


@dataclass(frozen=True)
class TritonTarget:
    name: str = NAME
    devices: frozenset[str] = _GPU | {"cpu"} if _INTERPRETED else _GPU
    by_itself: bool = False
    generated: bool = True
    suffix: str = SUFFIX
    tunable: bool = True
    late: bool = not _INTERPRETED

    def lse_dtype(self, spec: AttentionSpec) -> str:
        return spec.lse_dtype

    def forward(self, spec: AttentionSpec) -> Kernel:
        with _installed():
            from fuse.targets.triton.function import REFUSALS
            from fuse.targets.triton.launch import TritonKernel

        return KernelOrElse(TritonKernel(spec), partial(ReferenceKernel, spec, spec.lse_dtype), REFUSALS)

    def backward(self, of: Gradient) -> Backward:
        with _installed():
            from fuse.targets.triton.function import REFUSALS
            from fuse.targets.triton.launch_backward import TritonBackward

        return OrElse(TritonBackward(of.spec, of.wanted), partial(ReferenceBackward, of), REFUSALS, "backward")

    def tile_map(self, spec: TileMap) -> MapKernel:
        with _installed():
            from fuse.targets.triton.function import REFUSALS
            from fuse.targets.triton.launch_tile_map import TritonTileMap

        return OrElse(TritonTileMap(spec), partial(ReferenceTileMap, spec), REFUSALS, "tile map")

    def tile_size(self, spec: AttentionSpec) -> tuple[int, int]:
        try:
            from fuse.targets.triton.module import current_architecture
        except ImportError:
            return _block(spec, "sm_80")
        return _block(spec, current_architecture().name)


@contextmanager
def _installed() -> Iterator[None]:
    """What is imported inside needs Triton. Raises BuildFailed, with how to get it."""
    try:
        yield
    except ImportError as error:
        raise BuildFailed(f"{error}. Target {NAME!r} needs Triton: pip install 'torch-fuse[triton]'") from error


def _block(spec: AttentionSpec, architecture: str) -> tuple[int, int]:
    chosen = plan_triton(spec, ARCHITECTURES[architecture])
    return chosen.block_q, chosen.block_k
