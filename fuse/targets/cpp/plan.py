"""Which kernel serves a spec on this machine, and with what tile sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fuse.ir.expr import walk
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap

# Lanes of 32 bits, and accumulators (rows x vectors) that leave registers for the operands: 32 registers or 16.
_SHAPES = {"avx512": (16, 8, 3), "avx2": (8, 4, 3), "neon": (4, 8, 3), "sse": (4, 4, 2)}
# Units that multiply bfloat16 pairs, beside AVX-512. The emulated one gives AMX's results where there is none.
MATRIX_UNITS = {"avx512_bf16": (16, 6, 3), "amx": (16, 32, 2), "amx_emulated": (16, 32, 2)}
ISAS = (*_SHAPES, *MATRIX_UNITS)


@dataclass(frozen=True)
class Plan:
    """Choices that one kernel source is rendered with.

    core           the way that kernels go: the folder of templates, lanes or matrix
    isa            instruction set, one of ISAS
    real           C type of scores and sums
    width          lanes of a vector
    vectors        vectors of queries in a block
    rows           rows of the microkernel
    block_k        keys in a tile
    wave_bytes     packed keys and values that are held at a time
    thread_work    multiply-adds that are worth a thread
    part_keys      backward: keys whose gradients a thread sums at a time
    decode_queries queries up to which keys and values are read in place, once, instead of packed; 0: never
    """

    core: str
    isa: str
    real: str
    width: int
    vectors: int
    rows: int
    block_k: int
    wave_bytes: int = 8 * 2**20
    thread_work: int = 2**18
    part_keys: int = 384
    decode_queries: int = 0


def plan(spec: AttentionSpec, isa: str) -> Plan:
    """The plan for ``spec`` on ``isa``; ValueError for an unknown one."""
    if isa not in ISAS:
        raise ValueError(f"instruction set {isa!r} is none of {ISAS}")
    if isa in MATRIX_UNITS:
        if _is_bfloat16(spec):
            width, rows, vectors = MATRIX_UNITS[isa]
            return Plan("matrix", isa, "float", width, vectors, rows, block_k=64, wave_bytes=2**20, decode_queries=4)
        isa = "avx512"
    _, rows, vectors = _SHAPES[isa]
    real, width = _lanes(isa, spec.lse_dtype == "float64")
    return Plan("lanes", isa, real, width, vectors, rows, block_k=128, decode_queries=4)


def plan_tile_map(spec: TileMap, isa: str) -> Plan:
    """As ``plan``; a block is what is classified together."""
    isa = "avx512" if isa in MATRIX_UNITS else isa
    real, width = _lanes(isa, any(node.dtype == "float64" for node in walk(spec.predicate)))
    return Plan("tile_map", isa, real, width, vectors=1, rows=1, block_k=512, thread_work=2**16)


def _lanes(isa: str, double: bool) -> tuple[str, int]:
    """The C type of reals, and how many of them a vector holds."""
    width = _SHAPES[isa][0]
    return ("double", width // 2) if double else ("float", width)


def backward_plan(spec: AttentionSpec, isa: str, terms: bool) -> Plan:
    """The plan of the backward kernel of ``spec`` on ``isa``; ValueError for an unknown one.

    terms   whether entries have gradients beside those of query, key and value, which the matrix core does not sum
    """
    forward = plan(spec, isa)
    multiplied = spec.out_dtype in ("bfloat16", "float32")  # the result's gradient is a factor of products, too
    if forward.core == "matrix" and multiplied and not terms:
        return replace(forward, vectors=12, block_k=64, part_keys=768, decode_queries=0)
    return replace(plan(spec, "avx512") if forward.core == "matrix" else forward, block_k=96, decode_queries=0)


def weights_plan(spec: AttentionSpec, isa: str) -> Plan:
    """The plan of the kernel of weights of ``spec`` on ``isa``: of the lanes core, whose scores the matrix unit multiplies."""
    forward = plan(spec, isa)
    if forward.core == "matrix":
        return replace(plan(spec, "avx512"), isa=isa, block_k=96, decode_queries=0)
    return replace(forward, decode_queries=0)


def lse_dtype(spec: AttentionSpec) -> str:
    """What the log-sum-exp of rows is kept in for backward.

    Where nothing else rounds to 16 bits, its rounding to float32 would be most of the error of a row's gradients.
    """
    half = all(load.dtype in ("bfloat16", "float16") for load in (spec.query, spec.key, spec.value))
    return spec.lse_dtype if half else "float64"


def _is_bfloat16(spec: AttentionSpec) -> bool:
    """Whether both products take bfloat16, and nothing asks for more than float around them."""
    factors = all(load.dtype == "bfloat16" for load in (spec.query, spec.key, spec.value))
    return factors and spec.lse_dtype != "float64"
