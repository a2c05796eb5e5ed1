"""Makes the kernels of a target, or what stands in for them and why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from fuse.codegen.sinks import Unsupported
from fuse.errors import FuseError
from fuse.gradient import Gradient
from fuse.runtime.cache import BuildFailed
from fuse.runtime.cpp import CppKernel, CppTileMap, build, build_tile_map
from fuse.runtime.cpp_backward import CppBackward, build_backward
from fuse.runtime.protocols import Backward, Kernel, MapKernel
from fuse.runtime.refused import KernelOrElse, OrElse
from fuse.runtime.standin import ReferenceBackward, ReferenceKernel, ReferenceTileMap
from fuse.spec import AttentionSpec
from fuse.tiles import TileMap

K = TypeVar("K")


def forward(spec: AttentionSpec, target: str) -> Kernel:
    """Never fails, as all here."""

    def cpp() -> Kernel:
        return CppKernel(spec, build(spec))

    return _made(target, cpp, partial(_triton, spec), partial(ReferenceKernel, spec, target))


def backward(of: Gradient, target: str) -> Backward:
    def cpp() -> Backward:
        return CppBackward(of.spec, of.wanted, build_backward(of.spec, of.wanted))

    return _made(target, cpp, partial(_triton_backward, of), partial(ReferenceBackward, of))


def tile_map(spec: TileMap, target: str) -> MapKernel:
    def cpp() -> MapKernel:
        return CppTileMap(spec, build_tile_map(spec))

    return _made(target, cpp, partial(_triton_map, spec), partial(ReferenceTileMap, spec))


def _made(target: str, cpp: Callable[[], K], triton: Callable[[], K], reference: Callable[..., K]) -> K:
    if target == "reference":
        return reference()
    try:
        return triton() if target == "triton" else cpp()
    except (BuildFailed, Unsupported, FuseError, OSError) as error:
        return reference(str(error))
    except ImportError as error:
        return reference(f"{error}. Target 'triton' needs Triton: pip install 'torch-fuse[triton]'")
    except Exception as error:  # a defect of code generation must not cost the user the model
        return reference(f"rendering failed, please report it: {type(error).__name__}: {error}")


# Triton is not there for every platform.


def _triton(spec: AttentionSpec) -> Kernel:
    from fuse.runtime.triton import TritonKernel
    from fuse.runtime.triton_launch import REFUSALS

    return KernelOrElse(TritonKernel(spec), partial(ReferenceKernel, spec, "triton"), REFUSALS)


def _triton_backward(of: Gradient) -> Backward:
    from fuse.runtime.triton_backward import TritonBackward
    from fuse.runtime.triton_launch import REFUSALS

    return OrElse(TritonBackward(of.spec, of.wanted), partial(ReferenceBackward, of), REFUSALS, "backward")


def _triton_map(spec: TileMap) -> MapKernel:
    from fuse.runtime.triton_launch import REFUSALS
    from fuse.runtime.triton_map import TritonTileMap

    return OrElse(TritonTileMap(spec), partial(ReferenceTileMap, spec), REFUSALS, "tile map")
