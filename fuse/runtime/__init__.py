"""Kernels of specs: built once, in parallel, shared by all sites that compute the same."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fuse import kept, reference, tiles
from fuse.codegen.sinks import Unsupported
from fuse.gradient import Gradient, gradient
from fuse.planner import lse_dtype
from fuse.runtime.cache import builds
from fuse.runtime.cpp import BuildFailed, CppKernel, CppTileMap, build, build_tile_map
from fuse.runtime.cpp_backward import CppBackward, build_backward
from fuse.runtime.refused import KernelOrElse, OrElse
from fuse.spec import AttentionSpec
from fuse.tiles import TileMap

__all__ = [
    "Kernel",
    "backward_kernel",
    "builds",
    "forward_kernel",
    "kernel",
    "map_kernel",
    "prepare",
    "prepare_backward",
    "reset",
]


class Kernel(Protocol):
    """Computes one spec. ``source`` is the generated file, None where the reference stands in for a kernel."""

    @property
    def source(self) -> Path | None: ...

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor: ...

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The result and the log-sum-exp of its rows, as fuse.gradient defines it."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A kernel that can measure which of its plans is the fastest."""

    def tune(self) -> None: ...


class ReferenceKernel:
    """What runs where no kernel can be built: the same function in plain PyTorch, slowly."""

    source: Path | None = None

    def __init__(self, spec: AttentionSpec, target: str, reason: str = "") -> None:
        self._spec = spec
        self._lse_dtype: torch.dtype = getattr(torch, lse_dtype(spec, target))
        self.reason = reason  # why there is no kernel; empty where none was asked for

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return reference.attention(self._spec, operands, sizes, "eager")

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention_with_lse(self._spec, operands, sizes, "eager")
        return out, lse.to(self._lse_dtype)


S = TypeVar("S")
K = TypeVar("K")
MapKernel = Callable[[Sequence[Tensor], Sequence[int]], Tensor]
Forward = Callable[[Sequence[Tensor], Sequence[int]], tuple[Tensor, Tensor]]
# (grad_out of any strides, operands, sizes, out, lse) → gradients of the wanted operands, each laid out as empty_like of it
Backward = Callable[[Tensor, Sequence[Tensor], Sequence[int], Tensor, Tensor], list[Tensor]]
_kernels: dict[tuple[AttentionSpec, str], Future[Kernel]] = {}
_map_kernels: dict[tuple[TileMap, str], Future[MapKernel]] = {}
_backward_kernels: dict[tuple[Gradient, str], Future[Backward]] = {}
_CPP = ("auto", "cpp")
_lock = threading.Lock()
_pools: dict[bool, ThreadPoolExecutor] = {}
_warned = False


def kernel(spec: AttentionSpec, target: str) -> Kernel:
    """The kernel of ``spec``, built now if ``prepare`` has not; never fails: the reference stands in, with one warning.

    target  one of fuse.options.TARGETS
    """
    made = _begun(_kernels, (spec, target), _make).result()
    if isinstance(made, ReferenceKernel) and made.reason:
        _warn(made.reason)
    return made


def forward_kernel(spec: AttentionSpec, target: str) -> Forward:
    """``kernel`` for training: gives the rows' log-sum-exp beside the result."""
    return kernel(spec, target).forward


def backward_kernel(spec: AttentionSpec, target: str, wanted: tuple[bool, ...]) -> Backward:
    """The kernel of the gradients of the ``wanted`` operands; never fails, as ``kernel``."""
    return _begun(_backward_kernels, (gradient(spec, tuple(wanted)), target), _make_backward).result()


def map_kernel(spec: TileMap, target: str) -> MapKernel:
    """What computes a map of tiles; never fails, as ``kernel``."""
    return _begun(_map_kernels, (spec, target), _make_map).result()


def prepare(specs: Iterable[AttentionSpec], target: str, tune: bool = False) -> None:
    """Starts building the kernels of ``specs`` in parallel and returns at once. ``tune``: those that have plans to measure."""
    for spec in specs:
        made = _begun(_kernels, (spec, target), _make)
        if tune:
            made.add_done_callback(_tune)
        if spec.mask is not None and spec.mask.tiles is not None and (use := tiles.map_of(spec)) is not None:
            _begun(_map_kernels, (use.tile_map, target), _make_map)


def prepare_backward(spec: AttentionSpec, target: str, wanted: tuple[bool, ...], tune: bool = False) -> None:
    """As ``prepare``, for the kernel that ``backward_kernel`` will give. It gives way to all else: nobody may ask for it."""
    made = _begun(_backward_kernels, (gradient(spec, wanted), target), _make_backward, later=True)
    if tune:
        made.add_done_callback(_tune)


def reset() -> None:
    """Forgets loaded kernels; what is on disk stays."""
    global _lock, _warned
    _kernels.clear()
    _map_kernels.clear()
    _backward_kernels.clear()
    _pools.clear()
    kept.reset()
    _lock, _warned = threading.Lock(), False


def _begun(
    futures: dict[tuple[S, str], Future[K]], key: tuple[S, str], make: Callable[[S, str], K], later: bool = False
) -> Future[K]:
    with _lock:
        if key not in futures:
            futures[key] = _pool(later).submit(make, *key)
        return futures[key]


def beside(function: Callable[..., None], *arguments: object) -> Future[None]:
    """Runs ``function`` after the builds that were begun, in parallel."""
    with _lock:
        return _pool(later=True).submit(function, *arguments)


def _pool(later: bool) -> ThreadPoolExecutor:
    if later not in _pools:
        initializer = _give_way if later else None
        _pools[later] = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fuse-build", initializer=initializer)
    return _pools[later]


def _give_way() -> None:
    """Lowers the priority of this thread, which the compilers that it starts inherit; only Linux has one for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(os.getpriority(os.PRIO_PROCESS, 0) + 5, 19))


def _make_backward(of: Gradient, target: str) -> Backward:
    try:
        if target in _CPP:
            return CppBackward(of.spec, of.wanted, build_backward(of.spec, of.wanted))
        if target == "triton":
            return _triton_backward(of)
    except (Unsupported, BuildFailed, ImportError, OSError):
        pass  # where nothing can be built forward fails likewise, and warns
    except Exception as error:  # a defect of code generation must not cost the user the model
        _warn(f"rendering failed, please report it: {type(error).__name__}: {error}")

    return _reference_backward(of)


def _reference_backward(of: Gradient) -> Backward:
    def run(grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor) -> list[Tensor]:
        return reference.attention_backward(of.spec, grad_out, operands, sizes, of.wanted, "eager")

    return run


def _make_map(spec: TileMap, target: str) -> MapKernel:
    try:
        if target != "reference":
            return CppTileMap(spec, build_tile_map(spec)) if target in _CPP else _triton_map(spec)
    except (BuildFailed, ImportError, OSError):
        pass  # the site's own kernel fails likewise, and warns
    except Exception as error:  # as above
        _warn(f"rendering failed, please report it: {type(error).__name__}: {error}")
    return partial(reference.tile_map, spec)


def _make(spec: AttentionSpec, target: str) -> Kernel:
    if target == "reference":
        return ReferenceKernel(spec, target)
    try:
        return CppKernel(spec, build(spec)) if target in _CPP else _triton(spec)
    except (BuildFailed, ImportError, OSError) as error:
        return ReferenceKernel(spec, target, str(error))
    except Exception as error:  # a defect of code generation must not cost the user the model
        return ReferenceKernel(spec, target, f"rendering failed, please report it: {type(error).__name__}: {error}")


def _tune(made: Future[Any]) -> None:
    if isinstance(kernel := made.result(), Tunable):
        kernel.tune()


def _triton(spec: AttentionSpec) -> Kernel:
    from fuse.runtime.triton import TritonKernel  # Triton is not there for every platform
    from fuse.runtime.triton_launch import REFUSALS

    return KernelOrElse(TritonKernel(spec), ReferenceKernel(spec, "triton"), REFUSALS, _warn)


def _triton_backward(of: Gradient) -> Backward:
    from fuse.runtime.triton_backward import TritonBackward
    from fuse.runtime.triton_launch import REFUSALS

    return OrElse(TritonBackward(of.spec, of.wanted), _reference_backward(of), REFUSALS, _warn)


def _triton_map(spec: TileMap) -> MapKernel:
    from fuse.runtime.triton_launch import REFUSALS
    from fuse.runtime.triton_map import TritonTileMap

    return OrElse(TritonTileMap(spec), partial(reference.tile_map, spec), REFUSALS, _warn)


def _warn(reason: str) -> None:
    global _warned
    with _lock:
        first, _warned = not _warned, True
    if first:
        warnings.warn(f"fuse runs attention without its kernels, slowly: {reason}", RuntimeWarning, stacklevel=3)


# The threads of the pool do not survive a fork, and a lock may be held by one of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset)
