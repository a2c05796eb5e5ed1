"""Batching rules of the ops: under ``torch.vmap`` a call for each example is one call of a spec with one more batch index."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fuse.ir.batched import batched, batched_map, batched_sizes
from fuse.ir.spec import AttentionSpec, IntLike
from fuse.ir.tile_map import TileMap
from fuse.torch_private import VmapInfo, add_batch_dim, is_legacy_batched, legacy_vmap_level, remove_batch_dim

Dims = Sequence[int | None]  # where the examples are; None: in no dimension


@cache
def _text(spec: str, examples: tuple[bool, ...]) -> str:
    return batched(AttentionSpec.from_json(spec), examples).to_json()


@cache
def _batch(spec: str) -> int:
    return AttentionSpec.from_json(spec).batch


@cache
def _map(spec: str) -> TileMap:
    return TileMap.from_json(spec)


def examples_first(tensors: Sequence[Tensor], dims: Dims) -> list[Tensor]:
    return [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]


def batched_call(spec: str, sizes: Sequence[IntLike], dims: Dims, examples: IntLike) -> tuple[str, list[IntLike]]:
    """The text and the sizes of the call for all examples."""
    return _text(spec, tuple(d is not None for d in dims)), batched_sizes(sizes, _batch(spec), examples)


def attention_rule(
    info: VmapInfo, in_dims: Any, operands: list[Tensor], sizes: list[IntLike], spec: str, target: str
) -> tuple[Tensor, int]:
    text, all_sizes = batched_call(spec, sizes, in_dims[0], info.batch_size)
    return torch.ops.fuse.attention.default(examples_first(operands, in_dims[0]), all_sizes, text, target), _batch(spec)


def max_rule(info: VmapInfo, in_dims: Any, operands: list[Tensor], sizes: list[IntLike], spec: str) -> tuple[Tensor, int]:
    text, all_sizes = batched_call(spec, sizes, in_dims[0], info.batch_size)
    return torch.ops.fuse.attention_max.default(examples_first(operands, in_dims[0]), all_sizes, text), _batch(spec)


def lse_rule(info: VmapInfo, in_dims: Any, *call: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _several_results(torch.ops.fuse.attention_lse.default, info, in_dims, *call)


def rows_rule(info: VmapInfo, in_dims: Any, *call: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _several_results(torch.ops.fuse.attention_rows.default, info, in_dims, *call)


def forward_rule(info: VmapInfo, in_dims: Any, *call: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _several_results(torch.ops.fuse.attention_forward.default, info, in_dims, *call)


def _several_results(
    op: Any, info: VmapInfo, in_dims: Any, operands: list[Tensor], sizes: list[IntLike], spec: str, target: str
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    text, all_sizes = batched_call(spec, sizes, in_dims[0], info.batch_size)
    results = op(examples_first(operands, in_dims[0]), all_sizes, text, target)
    return results, (_batch(spec),) * len(results)


def backward_rule(
    info: VmapInfo, in_dims: Any, grad_out: Tensor, operands: list[Tensor], sizes: list[IntLike], out: Tensor, lse: Tensor,
    spec: str, target: str, wanted: list[bool], grad_lse: Tensor | None = None,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """Each example has its own gradients, also of an operand that all of them read."""
    at, n = _batch(spec), info.batch_size
    moved = examples_first(operands, in_dims[1])
    dims = [0 if w or d is not None else None for d, w in zip(in_dims[1], wanted, strict=True)]
    given = [t.expand(n, *t.shape) if own == 0 and d is None else t for t, own, d in zip(moved, dims, in_dims[1], strict=True)]
    text, all_sizes = batched_call(spec, sizes, dims, n)
    rows = [_at(t, d, at, n) for t, d in ((grad_out, in_dims[0]), (out, in_dims[3]), (lse, in_dims[4]))]
    of_lse = None if grad_lse is None else _at(grad_lse, in_dims[8], at, n)
    call = torch.ops.fuse.attention_backward.default
    grads = call(rows[0], given, all_sizes, rows[1], rows[2].contiguous(), text, target, wanted, of_lse)
    return grads, [0] * len(grads)


def weights_rule(
    info: VmapInfo, in_dims: Any, operands: list[Tensor], lse: Tensor, sizes: list[IntLike], spec: str, target: str,
    heads: IntLike,
) -> tuple[Tensor, int]:  # fmt: skip
    """Examples are the last batch index, so that means over heads are taken of whole matrices."""
    at, n = _batch(spec), info.batch_size
    text, all_sizes = batched_call(spec, sizes, in_dims[0], n)
    rows = _at(lse, in_dims[1], at, n).contiguous()
    whole = torch.ops.fuse.attention_weights.default(examples_first(operands, in_dims[0]), rows, all_sizes, text, target, 0)
    matrices = whole.movedim(at, 0)
    return matrices if heads == 0 else matrices.flatten(1, at).unflatten(1, (-1, heads)).mean(2), 0


def weights_backward_rule(
    info: VmapInfo, in_dims: Any, grad: Tensor, operands: list[Tensor], sizes: list[IntLike], spec: str, target: str,
    wanted: list[bool], heads: IntLike,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """Each example has its own gradients, also of an operand that all of them read."""
    at, n = _batch(spec), info.batch_size
    given = [_at(t, d, 0, n) if w or d is not None else t for t, d, w in zip(operands, in_dims[1], wanted, strict=True)]
    dims = [0 if w or d is not None else None for d, w in zip(in_dims[1], wanted, strict=True)]
    text, all_sizes = batched_call(spec, sizes, dims, n)
    each = _at(grad, in_dims[0], 0, n)
    if heads != 0:
        each = (each / heads).repeat_interleave(heads, 1).unflatten(1, sizes[:at])
    of_whole = each.movedim(0, at)
    grads = torch.ops.fuse.attention_weights_backward.default(of_whole, given, all_sizes, text, target, wanted, 0)
    return grads, [0] * len(grads)


def tile_map_rule(
    info: VmapInfo, in_dims: Any, operands: list[Tensor], sizes: list[IntLike], spec: str, target: str, keep: bool
) -> tuple[Tensor, int]:
    of = _map(spec)
    text = batched_map(of, tuple(d is not None for d in in_dims[0])).to_json()
    all_sizes = batched_sizes(sizes, of.batch, info.batch_size)
    return torch.ops.fuse.tile_map.default(examples_first(operands, in_dims[0]), all_sizes, text, target, keep), of.batch


def _at(t: Tensor, dim: int | None, to: int, examples: IntLike) -> Tensor:
    """``t`` with its examples counted by dimension ``to``."""
    if dim is not None:
        return t.movedim(dim, to)
    return t.unsqueeze(to).expand(*t.shape[:to], examples, *t.shape[to:])


def legacy_backward_rule(
    grad_out: Tensor, operands: list[Tensor], sizes: list[IntLike], out: Tensor, lse: Tensor, spec: str, target: str,
    wanted: list[bool], grad_lse: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Under ``is_grads_batched``, which has a vmap of its own: ``grad_out`` or ``grad_lse`` or both have examples there."""
    level = legacy_vmap_level()
    counted = grad_lse if grad_lse is not None and is_legacy_batched(grad_lse) else grad_out
    info = VmapInfo(remove_batch_dim(counted, level, 1, 0).shape[0], "error")
    each = remove_batch_dim(grad_out, level, info.batch_size, 0)
    of_lse = None if grad_lse is None else remove_batch_dim(grad_lse, level, info.batch_size, 0)
    dims = (0, [None] * len(operands), None, None, None, None, None, None, 0)
    grads, _ = backward_rule(info, dims, each, operands, sizes, out, lse, spec, target, wanted, of_lse)
    return [add_batch_dim(g, 0, level) for g in grads]
