"""Tiles of the Triton kernels of gradients: registers hold the sums of a program beside two tiles of scores."""

from __future__ import annotations

from dataclasses import dataclass

from fuse.ir.expr import Load, axes, walk
from fuse.ir.philox import drawn_in
from fuse.ir.spec import AttentionSpec
from fuse.targets.triton.plan import Architecture, described, widened


@dataclass(frozen=True)
class Launch:
    """What one kernel is launched with: queries and keys of a tile, warps, stages of its pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TritonBackwardPlan:
    """Choices for the kernels of one spec.

    rows       what is known of a row, once
    keys       a program owns block_k keys and visits all queries
    queries    a program owns block_q queries and visits all keys
    distances  a program owns block_k distances of query and key, and visits block_q queries and twice as many keys at a time
    described  what the kernels of keys and queries visit may be copied by tensor descriptors
    """

    rows: Launch
    keys: Launch
    queries: Launch
    distances: Launch
    described: bool = False


# block_q, block_k, warps. Half as much each, about; found by compiling: the first that does not spill for a level of demand.
_KEYS = ((64, 128, 8), (32, 128, 8), (32, 64, 8), (16, 64, 8), (16, 32, 4), (16, 16, 4))
_QUERIES = ((128, 64, 8), (128, 64, 8), (128, 32, 8), (64, 32, 8), (32, 32, 4), (16, 16, 4))
_ROWS, _DISTANCES = Launch(32, 16, 4, 1), Launch(32, 32, 4, 1)
# Where operands lie in shared memory, or results beside the registers, more is left for sums.
_LEVELS = {"wgmma": 0, "tcgen05": 1, "mma": 1, "mfma": 2, "none": 3}


def candidates_backward(spec: AttentionSpec, arch: Architecture, shared: bool = False) -> tuple[TritonBackwardPlan, ...]:
    """Plans for ``spec`` on ``arch``, the most promising first; never empty. The last one asks for least.

    shared  entries add to elements that they share
    """
    width = widened(max(spec.qk_dim, spec.v_dim))
    size = {"float64": 8, "float32": 4}.get(spec.query.dtype, 2)
    level = _LEVELS[arch.units if size == 2 else "none"]
    first = level + (width * size // 256).bit_length() + _demand(spec, arch) + shared
    stages = 2 if size == 2 else 1
    copied = described(spec, arch)
    return tuple(
        TritonBackwardPlan(_ROWS, Launch(*_KEYS[level], stages), Launch(*_QUERIES[level], stages), _DISTANCES, copied)
        for level in range(min(first, len(_KEYS) - 1), len(_KEYS))
    )


def _demand(spec: AttentionSpec, arch: Architecture) -> int:
    """What entries need beside their scores: addresses of their own, or random numbers; conditions."""
    if any(isinstance(n, Load) and {"q", "k"} <= axes(n) for n in walk(spec.score, spec.weight)):
        return 2
    if drawn_in(spec.score, spec.weight):
        return 1 if arch.from_shared else 2
    return int(spec.mask is not None and spec.mask.residual is not None)
