"""Sizes and tensors with which a kernel can be run alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuse.ir.expr import FLOATS, Load, walk
from fuse.ir.interval import WHOLE, in_call, range_of
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap

LENGTH, HEADS = 512, 8
_BATCH, _EXTRA = 1, 128
# Dimensions whose index comes from data: the tables and buckets that models have are at most this long.
_UNKNOWN_EXTENT = 1024


@dataclass(frozen=True)
class ExampleTensor:
    """Dense, its dimensions in memory from outermost to innermost as ``order`` names them.

    dtype  or "real", what a kernel computes in
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype in ("real", *FLOATS)


@dataclass(frozen=True)
class Example:
    """``sizes`` are the values of ``spec.symbols``; ``more`` follows the operands, and holds the results if it is not empty."""

    sizes: tuple[int, ...]
    operands: tuple[ExampleTensor, ...]
    out: ExampleTensor
    more: tuple[ExampleTensor, ...] = ()

    @property
    def results(self) -> tuple[ExampleTensor, ...]:
        return self.more[1:] or (self.out,)


def row_major(dtype: str, shape: Sequence[int]) -> ExampleTensor:
    return ExampleTensor(dtype, tuple(shape), tuple(range(len(shape))))


def example(spec: AttentionSpec | TileMap, length: int = LENGTH, heads: int = HEADS) -> Example:
    """Operands just large enough for every access of ``spec`` with ``length`` queries and keys."""
    batch = tuple(_BATCH if i == 0 and spec.batch > 1 else heads for i in range(spec.batch))
    sizes = (*batch, length, length, *(_EXTRA for _ in spec.extra))
    operands = (row_major(o.dtype, s) for o, s in zip(spec.operands, extents(spec, sizes), strict=True))
    return Example(sizes, tuple(operands), row_major(spec.out_dtype, spec.out_shape(sizes)))


def extents(spec: AttentionSpec | TileMap, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of operands just large enough for every access of ``spec`` with these values of its symbols."""
    symbols = dict(zip(spec.symbols, sizes, strict=True))
    leaves = in_call(symbols, {"d": spec.qk_dim, "e": spec.v_dim} if isinstance(spec, AttentionSpec) else {})
    most = 2 * max(symbols["q_len"], symbols["kv_len"]) + _UNKNOWN_EXTENT
    shapes = [[1] * operand.rank for operand in spec.operands]
    for node in walk(*(spec.roots().values() if isinstance(spec, AttentionSpec) else (spec.predicate,))):
        if isinstance(node, Load):
            for dim, coord in enumerate(node.coords):
                last: int = range_of(coord, leaves).high
                extent = _UNKNOWN_EXTENT if last == WHOLE["int64"].high else last + 1
                shapes[node.operand][dim] = max(shapes[node.operand][dim], min(extent, most))
    return [tuple(shape) for shape in shapes]


def example_of_gradients(spec: AttentionSpec, written: Sequence[tuple[int, str, tuple[int, ...]]]) -> Example:
    """``written``: operand, dtype and order in memory of each gradient."""
    made = example(spec)
    gradients = [ExampleTensor(dtype, made.operands[operand].shape, order) for operand, dtype, order in written]
    return Example(made.sizes, made.operands, made.out, (made.out, *gradients))
