"""Makes the kernels of a target, or what stands in for them and why. Never fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fuse.errors import FuseError
from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.destinations import Unsupported
from fuse.targets import registry
from fuse.targets.cache import BuildFailed
from fuse.targets.protocols import Backward, Kernel, MapKernel, WeightsKernel, Writes
from fuse.targets.standin import ReferenceBackward, ReferenceKernel, ReferenceTileMap, ReferenceWeights

K = TypeVar("K")


def forward(spec: AttentionSpec, target: str) -> Kernel:
    chosen = registry.named(target)
    return _made(lambda: chosen.forward(spec), lambda why: ReferenceKernel(spec, chosen.lse_dtype(spec), why))


def backward(of: Gradient, target: str) -> Backward:
    return _made(lambda: registry.named(target).backward(of), lambda why: ReferenceBackward(of, why))


def tile_map(spec: TileMap, target: str) -> MapKernel:
    return _made(lambda: registry.named(target).tile_map(spec), lambda why: ReferenceTileMap(spec, why))


def weights(spec: AttentionSpec, target: str) -> WeightsKernel:
    chosen = registry.named(target)
    if not isinstance(chosen, Writes):
        return ReferenceWeights(spec, f"target {target!r} has no kernels for weights")
    return _made(lambda: chosen.weights(spec), lambda why: ReferenceWeights(spec, why))


def _made(kernel: Callable[[], K], instead: Callable[[str], K]) -> K:
    try:
        return kernel()
    except (BuildFailed, Unsupported, FuseError, OSError, ImportError) as error:
        return instead(str(error))
    except Exception as error:  # a defect of code generation must not cost the user the model
        return instead(f"rendering failed, please report it: {type(error).__name__}: {error}")
