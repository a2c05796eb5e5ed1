"""Kernels of specs: built once, in parallel, shared by all sites that compute the same."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fuse import reference
from fuse.runtime.cache import builds
from fuse.runtime.cpp import BuildFailed, CppKernel, build
from fuse.spec import AttentionSpec

__all__ = ["Kernel", "backward_kernel", "builds", "forward_kernel", "kernel", "prepare", "reset"]


class Kernel(Protocol):
    """Computes one spec. ``source`` is the generated file, None where the reference stands in for a kernel."""

    @property
    def source(self) -> Path | None: ...

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor: ...

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The result and the log-sum-exp of its rows, as fuse.gradient defines it."""
        ...


class ReferenceKernel:
    """What runs where no kernel can be built: the same function in plain PyTorch, slowly."""

    source: Path | None = None

    def __init__(self, spec: AttentionSpec, reason: str = "") -> None:
        self._spec = spec
        self.reason = reason  # why there is no kernel; empty where none was asked for

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return reference.attention(self._spec, operands, sizes, "eager")

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        return reference.attention_with_lse(self._spec, operands, sizes, "eager")


_Key = tuple[AttentionSpec, str]
_kernels: dict[_Key, Future[Kernel]] = {}
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_warned = False


def kernel(spec: AttentionSpec, target: str) -> Kernel:
    """The kernel of ``spec``, built now if ``prepare`` has not; never fails: the reference stands in, with one warning.

    target  "cpp" or "auto", or "reference"
    """
    made = _future(spec, target).result()
    if isinstance(made, ReferenceKernel) and made.reason:
        _warn(made.reason)
    return made


Forward = Callable[[Sequence[Tensor], Sequence[int]], tuple[Tensor, Tensor]]
# (grad_out of any strides, operands, sizes, out, lse) → gradients of the wanted operands, each laid out as empty_like of it
Backward = Callable[[Tensor, Sequence[Tensor], Sequence[int], Tensor, Tensor], list[Tensor]]


def forward_kernel(spec: AttentionSpec, target: str) -> Forward:
    """``kernel`` for training: gives the rows' log-sum-exp beside the result."""
    return kernel(spec, target).forward


def backward_kernel(spec: AttentionSpec, target: str, wanted: tuple[bool, ...]) -> Backward:
    """The kernel of the gradients of the ``wanted`` operands; never fails, as ``kernel``."""

    def run(grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor) -> list[Tensor]:
        return reference.attention_backward(spec, grad_out, operands, sizes, wanted, "eager")

    return run


def prepare(specs: Iterable[AttentionSpec], target: str) -> None:
    """Starts building the kernels of ``specs`` in parallel and returns at once."""
    for spec in specs:
        _future(spec, target)


def reset() -> None:
    """Forgets loaded kernels; what is on disk stays."""
    global _kernels, _pool, _lock, _warned
    _kernels, _pool, _lock, _warned = {}, None, threading.Lock(), False


def _future(spec: AttentionSpec, target: str) -> Future[Kernel]:
    global _pool
    with _lock:
        key = (spec, target)
        if key not in _kernels:
            if _pool is None:
                _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="fuse-build")
            _kernels[key] = _pool.submit(_make, spec, target)
        return _kernels[key]


def _make(spec: AttentionSpec, target: str) -> Kernel:
    if target == "reference":
        return ReferenceKernel(spec)
    try:
        return CppKernel(spec, build(spec))
    except (BuildFailed, OSError) as error:
        return ReferenceKernel(spec, str(error))
    except Exception as error:  # a defect of code generation must not cost the user the model
        return ReferenceKernel(spec, f"rendering failed, please report it: {type(error).__name__}: {error}")


def _warn(reason: str) -> None:
    global _warned
    with _lock:
        first, _warned = not _warned, True
    if first:
        warnings.warn(f"fuse runs attention without its kernels, slowly: {reason}", RuntimeWarning, stacklevel=3)


# The threads of the pool do not survive a fork, and a lock may be held by one of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset)
