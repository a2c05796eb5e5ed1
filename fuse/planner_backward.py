"""Tiles of the Triton kernels of gradients: registers hold the sums of a program beside two tiles of scores."""

from __future__ import annotations

from dataclasses import dataclass

from fuse.expr import Load, axes, walk
from fuse.spec import AttentionSpec


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

    width, v_width  powers of two that hold qk_dim and v_dim, as matrix products want them
    rows            what is known of a row, once
    keys            a program owns block_k keys and visits all queries
    queries         a program owns block_q queries and visits all keys
    """

    width: int
    v_width: int
    rows: Launch
    keys: Launch
    queries: Launch


def plan_triton_backward(spec: AttentionSpec) -> TritonBackwardPlan:
    """The plan for ``spec``, that fits registers and shared memory from sm_80 on."""
    width, v_width = (max(16, 1 << (n - 1).bit_length()) for n in (spec.qk_dim, spec.v_dim))
    size = {"float64": 8, "float32": 4}.get(spec.query.dtype, 2)
    row = max(width, v_width) * size  # bytes
    gathers = any(isinstance(n, Load) and {"q", "k"} <= axes(n) for n in walk(spec.score))  # an address for each entry
    if row > 256 or gathers:
        small = Launch(32, 32, 4, 1)
        return TritonBackwardPlan(width, v_width, small, small, small)
    return TritonBackwardPlan(width, v_width, Launch(64, 32, 4, 1), Launch(64, 128, 8, 2), Launch(128, 64, 8, 2))
