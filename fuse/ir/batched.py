"""One more batch index: what a spec computes for each example of a batch is what another spec computes for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

from fuse.ir import expr
from fuse.ir.expr import Expr, Load, index
from fuse.ir.spec import AttentionSpec, IntLike, Operand
from fuse.ir.tile_map import TileMap


@cache
def batched(spec: AttentionSpec, examples: tuple[bool, ...]) -> AttentionSpec:
    """``spec`` for a batch, whose index is its last batch index, outermost in the result.

    examples  for each operand whether its first dimension counts the examples; one without it is shared by all
    """
    dims = [d + (d >= spec.batch) for d in spec.out_order]
    return dataclasses.replace(
        spec.mapped(lambda root: _indexed(root, examples, spec.batch)),
        batch=spec.batch + 1,
        operands=_operands(spec.operands, examples),
        out_order=(spec.batch, *dims),
    )


@cache
def batched_map(spec: TileMap, examples: tuple[bool, ...]) -> TileMap:
    """The map of tiles likewise; (…, examples, cells of queries, cells of keys)."""
    predicate = _indexed(spec.predicate, examples, spec.batch)
    return dataclasses.replace(spec, batch=spec.batch + 1, operands=_operands(spec.operands, examples), predicate=predicate)


def batched_sizes(sizes: Sequence[IntLike], batch: int, examples: IntLike) -> list[IntLike]:
    """The values of the symbols of a spec that had ``batch`` batch dimensions."""
    return [*sizes[:batch], examples, *sizes[batch:]]


def _indexed(root: Expr, examples: tuple[bool, ...], batch: int) -> Expr:
    def rule(node: Expr) -> Expr | None:
        if not (isinstance(node, Load) and examples[node.operand]):
            return None
        return Load(node.dtype, node.operand, (index(f"b{batch}"), *node.coords))

    return expr.rewrite(root, rule)


def _operands(operands: Sequence[Operand], examples: tuple[bool, ...]) -> tuple[Operand, ...]:
    return tuple(dataclasses.replace(o, rank=o.rank + e) for o, e in zip(operands, examples, strict=True))
