"""Sizes and operand shapes with which a kernel can be run alone."""

from __future__ import annotations

from dataclasses import dataclass

from fuse.codegen.cpp import C_TYPES, Interval, interval
from fuse.expr import Expr, Index, Load, Symbol, walk
from fuse.spec import AttentionSpec

_LENGTH, _HEADS, _BATCH, _EXTRA = 512, 8, 1, 128
# Dimensions whose index comes from data: the tables and buckets that models have are at most this long.
_UNKNOWN_EXTENT = 1024


@dataclass(frozen=True)
class ExampleOperand:
    ctype: str
    shape: tuple[int, ...]
    is_float: bool


@dataclass(frozen=True)
class Example:
    """``sizes`` are the values of ``spec.symbols``."""

    sizes: tuple[int, ...]
    operands: tuple[ExampleOperand, ...]


def example(spec: AttentionSpec) -> Example:
    """Operands just large enough for every access of ``spec`` at the example's sizes."""
    batch = tuple(_BATCH if i == 0 and spec.batch > 1 else _HEADS for i in range(spec.batch))
    sizes = dict(zip(spec.symbols, (*batch, _LENGTH, _LENGTH, *(_EXTRA for _ in spec.extra)), strict=True))
    extents = {"q": sizes["q_len"], "k": sizes["kv_len"], "d": spec.qk_dim, "e": spec.v_dim}
    extents |= {f"b{i}": size for i, size in enumerate(batch)}

    def leaves(leaf: Expr) -> Interval:
        if isinstance(leaf, Symbol):
            return (sizes[leaf.name], sizes[leaf.name])
        return (0, extents[leaf.axis] - 1) if isinstance(leaf, Index) else None

    shapes = [[1] * operand.rank for operand in spec.operands]
    for node in walk(*spec.roots().values()):
        if isinstance(node, Load):
            for dim, coord in enumerate(node.coords):
                bounds = interval(coord, leaves)
                extent = _UNKNOWN_EXTENT if bounds is None else bounds[1] + 1
                shapes[node.operand][dim] = max(shapes[node.operand][dim], min(extent, 2 * _LENGTH + _UNKNOWN_EXTENT))
    operands = zip(spec.operands, shapes, strict=True)
    return Example(
        tuple(sizes.values()), tuple(ExampleOperand(C_TYPES[o.dtype], tuple(s), "float" in o.dtype) for o, s in operands)
    )
