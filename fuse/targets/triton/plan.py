"""Tile sizes and launch options of Triton kernels: what fits an architecture, the most promising first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from fuse.ir.expr import Apply, Expr, Load, Score, axes, contains, walk
from fuse.ir.philox import drawn_in
from fuse.ir.spec import AttentionSpec
from fuse.kernel.rectangles import describable

_SIZES = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "bfloat16": 2, "float16": 2}  # bytes; 1 for the rest


@dataclass(frozen=True)
class Architecture:
    """What a program of one kernel may take.

    units        of products of 16 bits: "wgmma" and "tcgen05" read operands from shared memory, "mma" and "mfma" (AMD) from
                 registers; "none": Triton knows none
    shared       bytes of shared memory; AMD's local data share
    registers    of 32 bits, of one thread
    warp         threads; AMD's wavefront
    """

    name: str
    units: str
    shared: int
    registers: int = 255
    warp: int = 32

    @property
    def from_shared(self) -> bool:
        return self.units in ("wgmma", "tcgen05")


# CUDA C++ Programming Guide, technical specifications per compute capability: shared memory per thread block, of which
# the system takes 1 KB from 8.0 on. AMD CDNA 2 and 3 instruction set guides: 64 KB of LDS, 512 vector registers a lane.
ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("sm_75", "none", 64 * 1024),
        Architecture("sm_80", "mma", 163 * 1024),
        Architecture("sm_86", "mma", 99 * 1024),
        Architecture("sm_89", "mma", 99 * 1024),
        Architecture("sm_90", "wgmma", 227 * 1024),
        Architecture("sm_100", "tcgen05", 227 * 1024),
        Architecture("sm_120", "mma", 99 * 1024),
        Architecture("gfx90a", "mfma", 64 * 1024, registers=512, warp=64),
        Architecture("gfx942", "mfma", 64 * 1024, registers=512, warp=64),
    )
}


def architecture(name: str) -> Architecture:
    """By name, as "sm_90" or "gfx942". Of one that is not listed, the listed one that promises least in its place."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name.startswith("gfx"):
        return ARCHITECTURES["gfx90a"]
    digits = re.fullmatch(r"sm_(\d+)", name)
    return ARCHITECTURES["sm_75" if digits is None or int(digits[1]) < 80 else "sm_86"]


@dataclass(frozen=True)
class TritonPlan:
    """Choices that one Triton kernel is launched with.

    width, v_width  powers of two that hold qk_dim and v_dim, as matrix products want them
    block_q         queries of a program
    block_k         keys of a tile
    warps, stages   of the launch
    described       tiles may be copied by tensor descriptors
    """

    width: int
    v_width: int
    block_q: int
    block_k: int
    warps: int
    stages: int
    described: bool = False


# block_q, block_k, warps, in the order of preference. Where operands of products lie in shared memory, larger tiles pay.
_WIDE = ((128, 128, 8),)
_TILES = ((128, 64, 4), (128, 64, 8), (64, 64, 4), (64, 64, 8), (64, 32, 4), (64, 32, 8), (32, 32, 4), (32, 32, 8),
          (16, 32, 4), (16, 16, 4))  # fmt: skip
_CANDIDATES = 6


def plan_triton(spec: AttentionSpec, arch: Architecture) -> TritonPlan:
    """The plan for ``spec`` on ``arch``: the first of its candidates."""
    return candidates(spec, arch)[0]


def candidates(spec: AttentionSpec, arch: Architecture) -> tuple[TritonPlan, ...]:
    """Plans that fit ``arch``, the most promising first; never empty. The last one asks for least."""
    least = _plan(spec, arch, 16, 16, 4, 1)
    fitting = islice(_fitting(spec, arch), _CANDIDATES)
    return tuple(dict.fromkeys((*fitting, least)))


def _fitting(spec: AttentionSpec, arch: Architecture) -> Iterator[TritonPlan]:
    for block_q, block_k, warps in (*_WIDE, *_TILES) if arch.from_shared else _TILES:
        for stages in (3, 2) if _size(spec) == 2 and arch.units != "mfma" else (2,):
            plan = _plan(spec, arch, block_q, block_k, warps, stages)
            if shared_memory(spec, plan, arch) <= arch.shared and registers(spec, plan, arch) <= arch.registers:
                yield plan
                break


def _plan(spec: AttentionSpec, arch: Architecture, block_q: int, block_k: int, warps: int, stages: int) -> TritonPlan:
    width, v_width = widened(spec.qk_dim), widened(spec.v_dim)
    return TritonPlan(width, v_width, block_q, block_k, warps, stages, described(spec, arch))


def described(spec: AttentionSpec, arch: Architecture) -> bool:
    """Whether tiles may be copied by tensor descriptors. sm_120 has them, too, but there kernels spill with them."""
    return arch.from_shared and describable(spec)


def widened(features: int) -> int:
    """A power of two, as matrix products want it."""
    return max(16, 1 << (features - 1).bit_length())


def shared_memory(spec: AttentionSpec, plan: TritonPlan, arch: Architecture) -> int:
    """Bytes, at most: queries, weights between two products, and for each stage keys, values and what entries load."""
    size, scores = _size(spec), plan.block_q * plan.block_k
    entries = sum(_SIZES.get(load.dtype, 1) for load in _entry_loads(spec)) * scores
    tile = (plan.width + plan.v_width) * plan.block_k * size + entries
    stages = plan.stages if arch.from_shared else max(1, plan.stages - 1)  # the last one is in registers
    weights = scores * (size if _has_units(spec, arch) else 4)
    queries = 0 if arch.units == "mfma" else plan.block_q * plan.width * size  # AMD's stay in registers
    return queries + stages * tile + weights + 1024


def registers(spec: AttentionSpec, plan: TritonPlan, arch: Architecture) -> int:
    """Of a thread, about: results, scores, weights and operands; what the program of an entry holds; and the rest.

    Factors are such that nothing that was compiled for sm_75 to sm_120 and stayed within 255 spilled.
    """
    size = _size(spec)
    word, scores, out = max(1, size // 4), plan.block_q * plan.block_k, plan.block_q * plan.v_width
    held = (out + scores) * word + scores * size // 4
    if not _has_units(spec, arch):  # each thread gathers rows of one operand and columns of the other
        held += 9 * max(out, scores) * word + plan.warps * arch.warp * plan.width // 2
    elif arch.units == "tcgen05":  # results go to tensor memory and back
        held += out
    elif arch.units != "wgmma":
        held += plan.block_q * plan.width * size // 4
    return (held + int(_entry_registers(spec) * scores)) // (plan.warps * arch.warp) + 63


def _entry_registers(spec: AttentionSpec) -> float:
    """A 64-bit address for each load, conditions, random numbers, and a share of the operations that follow the product."""
    score, conditions = spec.score, 0.0
    if spec.mask is not None:
        score = spec.mask.visible
        if spec.mask.residual is not None:  # with a finite fill, rows that see nothing are computed again
            conditions = 2.0 if math.isfinite(spec.mask.fill) else 0.75
    operations = sum(isinstance(node, Apply) and contains(node, Score) for node in walk(score)) - 1
    drawn = 0.75 * drawn_in(spec.weight)
    return 9 * len(_entry_loads(spec)) + conditions + drawn + 0.25 * operations


def _has_units(spec: AttentionSpec, arch: Architecture) -> bool:
    return arch.units != "none" and _size(spec) == 2


def _entry_loads(spec: AttentionSpec) -> list[Load]:
    """What is read for each entry of the scores."""
    nodes: tuple[Expr, ...] = (spec.score, spec.weight)
    return [node for node in walk(*nodes) if isinstance(node, Load) and {"q", "k"} <= axes(node)]


def _size(spec: AttentionSpec) -> int:
    """Bytes of an element of the products."""
    return max(_SIZES.get(load.dtype, 1) for load in (spec.query, spec.key, spec.value))
