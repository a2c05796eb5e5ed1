"""Kernels of specs: built once, in parallel, shared by all sites that compute the same."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from fuse.ir import tile_map
from fuse.ir.gradient import Gradient, gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.destinations import Unsupported
from fuse.memoize import forget
from fuse.report.runs import Part, Runs
from fuse.targets import fallback_warnings, kernel_or_reference, registry
from fuse.targets.cache import BuildFailed, builds
from fuse.targets.protocols import Backward, Kernel, MapKernel, Short, Shown, Tunable, WeightsKernel

__all__ = [
    "Backward",
    "Kernel",
    "MapKernel",
    "backward_kernel",
    "beside",
    "builds",
    "caller",
    "kernel",
    "map_kernel",
    "prepare",
    "prepare_backward",
    "prepare_weights",
    "reset",
    "running",
    "sources",
    "weights_kernel",
]


class _Runs(Protocol):
    @property
    def runs(self) -> Runs: ...


Key = TypeVar("Key", bound=tuple[Any, ...])
K = TypeVar("K")
R = TypeVar("R")
Made = TypeVar("Made", bound=_Runs)
_kernels: dict[tuple[AttentionSpec, str], Future[Kernel]] = {}
_map_kernels: dict[tuple[TileMap, str], Future[MapKernel]] = {}
_backward_kernels: dict[tuple[Gradient, str], Future[Backward]] = {}
_weights_kernels: dict[tuple[AttentionSpec, str], Future[WeightsKernel]] = {}
_calls: dict[tuple[str], Future[None]] = {}
_lock = threading.Lock()
_pools: dict[bool, ThreadPoolExecutor] = {}


def kernel(spec: AttentionSpec, target: str) -> Kernel:
    """The kernel of ``spec``, built now if ``prepare`` has not; never fails: the reference stands in, with one warning.

    target  one of fuse.options.TARGETS
    """
    made = _given(_begun(_kernels, (spec, target), kernel_or_reference.forward), target, "forward")
    if (calls := _calls.get((target,))) is not None:
        calls.result()
    return made


def backward_kernel(spec: AttentionSpec, target: str, wanted: tuple[bool, ...]) -> Backward:
    """The kernel of the gradients of the ``wanted`` operands; never fails, as ``kernel``."""
    of = gradient(spec, tuple(wanted))
    return _given(_begun(_backward_kernels, (of, target), kernel_or_reference.backward), target, "backward")


def map_kernel(spec: TileMap, target: str) -> MapKernel:
    """What computes a map of tiles; never fails, as ``kernel``."""
    return _given(_begun(_map_kernels, (spec, target), kernel_or_reference.tile_map), target, "tile map")


def weights_kernel(spec: AttentionSpec, target: str) -> WeightsKernel:
    """What writes the weights of ``spec``; never fails, as ``kernel``."""
    return _given(_begun(_weights_kernels, (spec, target), kernel_or_reference.weights), target, "weights")


def caller(operator: str, text: str, target: str, slow: Callable[..., Any]) -> Callable[..., Any]:
    """The shortest way to ``fuse::operator`` of the spec that is written ``text``; ``slow`` goes there by torch.ops."""
    _begun(_calls, (target,), _shorten_calls).result()
    short = registry.named(target)
    return short.caller(operator, text, slow) if isinstance(short, Short) else slow


def running(
    spec: AttentionSpec, target: str, wanted: tuple[bool, ...], weights: Sequence[AttentionSpec] = ()
) -> dict[Part, Runs]:
    """What computes ``spec``, the gradients of its ``wanted`` operands, the map of its mask, and ``weights`` beside it, as far
    as anybody has asked for them. Waits for nothing. Of several matrices the one that is worst off counts.
    """
    use = _map_of(spec)
    found: dict[Part, Future[Any] | None] = {
        "forward": _kernels.get((spec, target)),
        "backward": _backward_kernels.get((gradient(spec, wanted), target)) if any(wanted) else None,
        "tile map": _map_kernels.get((use, target)) if use is not None else None,
    }
    said = {part: _runs(future) for part, future in found.items() if future is not None}
    writing = [_runs(future) for w in weights if (future := _weights_kernels.get((w, target))) is not None]
    worst = next((runs for runs in writing if runs.by != "kernel"), next(iter(writing), None))
    return said if worst is None else said | {"weights": worst}


def sources(
    spec: AttentionSpec, target: str, wanted: tuple[bool, ...], weights: Sequence[AttentionSpec] = ()
) -> dict[Part, str]:
    """The kernels that ``target`` would build for ``spec`` on this machine, and for the first of ``weights`` beside it, those
    that it can show. Builds nothing."""
    shown, use = registry.named(target), _map_of(spec)
    if not isinstance(shown, Shown):
        return {}
    asked: dict[Part, Callable[[], str]] = {"forward": partial(shown.forward_source, spec)}
    if any(wanted):
        asked["backward"] = partial(shown.backward_source, gradient(spec, wanted))
    if use is not None:
        asked["tile map"] = partial(shown.tile_map_source, use)
    if weights:
        asked["weights"] = partial(shown.weights_source, weights[0])
    found: dict[Part, str] = {}
    for part, source in asked.items():
        with suppress(BuildFailed, Unsupported):
            found[part] = source()
    return found


def prepare(spec: AttentionSpec, target: str, tune: bool = False) -> None:
    """Starts building the kernel of ``spec``, beside others, and returns at once. ``tune``: it measures its plans, if any."""
    _begun(_calls, (target,), _shorten_calls)
    made = _begun(_kernels, (spec, target), kernel_or_reference.forward)
    if tune:
        made.add_done_callback(_tune)
    if (use := _map_of(spec)) is not None:
        _begun(_map_kernels, (use, target), kernel_or_reference.tile_map)


def prepare_weights(spec: AttentionSpec, target: str) -> None:
    """As ``prepare``, for the kernel that ``weights_kernel`` will give."""
    _begun(_weights_kernels, (spec, target), kernel_or_reference.weights)


def prepare_backward(spec: AttentionSpec, target: str, wanted: tuple[bool, ...], tune: bool = False) -> None:
    """As ``prepare``, for the kernel that ``backward_kernel`` will give. It gives way to all else: nobody may ask for it."""
    made = _begun(_backward_kernels, (gradient(spec, wanted), target), kernel_or_reference.backward, later=True)
    if tune:
        made.add_done_callback(_tune)


def reset() -> None:
    """Forgets loaded kernels, wherever they are remembered; what is on disk stays."""
    _empty()
    forget()


def _empty() -> None:
    global _lock
    _kernels.clear()
    _map_kernels.clear()
    _backward_kernels.clear()
    _weights_kernels.clear()
    _calls.clear()
    _pools.clear()
    fallback_warnings.reset()
    _lock = threading.Lock()


def _map_of(spec: AttentionSpec) -> TileMap | None:
    if spec.mask is None or spec.mask.tiles is None or (use := tile_map.map_of(spec)) is None:
        return None
    return use.tile_map


def _given(future: Future[Made], target: str, part: Part) -> Made:
    made = future.result()
    if made.runs.by == "reference" and registry.named(target).generated:
        fallback_warnings.warn_once(part, made.runs.why)
    return made


def _shorten_calls(target: str) -> None:
    if isinstance(short := registry.named(target), Short):
        short.shorten_calls()


def _runs(future: Future[Any]) -> Runs:
    if not future.done():
        return Runs("being built")
    runs: Runs = future.result().runs
    return runs


def _begun(futures: dict[Key, Future[K]], key: Key, make: Callable[..., K], later: bool = False) -> Future[K]:
    with _lock:
        if key not in futures:
            futures[key] = _submitted(later, make, *key)
        return futures[key]


def beside(function: Callable[..., None], *arguments: object) -> Future[None]:
    """Runs ``function`` after the builds that were begun, in parallel."""
    with _lock:
        return _submitted(True, function, *arguments)


def _submitted(later: bool, function: Callable[..., R], *arguments: Any) -> Future[R]:
    """Run by a thread of the pool, or here where the interpreter ends and starts none."""
    try:
        return _pool(later).submit(function, *arguments)
    except RuntimeError:
        done: Future[R] = Future()
        done.set_result(function(*arguments))
        return done


def _pool(later: bool) -> ThreadPoolExecutor:
    if later not in _pools:
        initializer = _give_way if later else None
        _pools[later] = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fuse-build", initializer=initializer)
    return _pools[later]


def _give_way() -> None:
    """Lowers the priority of this thread, which the compilers that it starts inherit; only Linux has one for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(os.getpriority(os.PRIO_PROCESS, 0) + 5, 19))


def _tune(made: Future[Any]) -> None:
    if isinstance(kernel := made.result(), Tunable):
        kernel.tune()


# The threads of the pool do not survive a fork, and a lock may be held by one of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_empty)
