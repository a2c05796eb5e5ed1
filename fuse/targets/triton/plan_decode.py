"""Whether few queries are served by packed rows and parts of the keys, and in how many parts: by sizes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fuse.ir.spec import AttentionSpec
from fuse.kernel import sharing
from fuse.targets.triton.plan import Architecture, TritonPlan, registers, shared_memory, widened

# Queries up to which a block of the forward kernel is mostly empty.
_DECODE_QUERIES = 16
# Keys that are worth a part of their own, whose result costs a write and a read.
_PART_KEYS = 256
# Rows of a tile: matrix units take 16. Keys of a tile and warps, and stages, in the order of preference.
_ROWS = (16, 32, 64)
_KEYS = ((64, 4), (64, 8), (32, 4), (32, 8))
_STAGES = (3, 2)


def plans(spec: AttentionSpec, arch: Architecture) -> tuple[TritonPlan, ...]:
    """As ``fuse.targets.triton.plan.candidates``; ``block_q`` is the number of rows that a tile may have."""
    width, v_width = widened(spec.qk_dim), widened(spec.v_dim)
    tiles = [(rows, *keys, stages) for rows in reversed(_ROWS) for keys in _KEYS for stages in _STAGES]
    found = [TritonPlan(width, v_width, *tile) for tile in tiles]
    return (*[p for p in found if _fits(spec, p, arch)][:3], TritonPlan(width, v_width, 16, 16, 4, 1))


def _fits(spec: AttentionSpec, plan: TritonPlan, arch: Architecture) -> bool:
    """More than 16 rows have batch indices and addresses that cost registers."""
    addresses = plan.block_q - 16
    return shared_memory(spec, plan, arch) <= arch.shared and registers(spec, plan, arch) + addresses < arch.registers


@dataclass(frozen=True)
class Route:
    """A launch: ``groups`` of batch indices that share keys, ``rows`` of each, and ``parts`` of the keys."""

    rows: int
    groups: int
    parts: int


def route(runs: Sequence[int], sizes: Sequence[int], block_q: int, processors: int) -> Route | None:
    """None where the forward kernel, with blocks of ``block_q`` queries of one batch index, serves as well or better.

    runs        of batch indices, as ``sharing.runs`` gives them
    sizes       of the batch dimensions, q_len, kv_len, …
    processors  multiprocessors of the device
    """
    q_len, kv_len = sizes[len(runs) : len(runs) + 2]
    blocks = -(-q_len // block_q) * math.prod(sizes[: len(runs)])
    if q_len > _DECODE_QUERIES and (2 * blocks > processors or kv_len < 4 * _PART_KEYS):
        return None
    whole = packed(runs, sizes)
    programs = whole.groups * -(-whole.rows // block(whole.rows, _ROWS[-1]))
    return packed(runs, sizes, max(1, min(-(-2 * processors // max(1, programs)), kv_len // _PART_KEYS)))


def packed(runs: Sequence[int], sizes: Sequence[int], parts: int = 1) -> Route:
    """The launch in any case."""
    pairs = list(zip(runs, sizes, strict=False))
    rows = sizes[len(runs)] * math.prod(n if run == sharing.ALL else run for run, n in pairs)
    groups = math.prod(1 if run == sharing.ALL else -(-n // run) for run, n in pairs)
    return Route(rows, groups, parts)


def block(rows: int, most: int) -> int:
    """Rows of a tile, of which there may be ``most``."""
    return next((n for n in _ROWS if rows <= n), most) if rows <= most else most
