"""Weights as a result of their own: their shape, and the spec whose gradients theirs are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from fuse.ir.expr import Load, apply, index
from fuse.ir.spec import AttentionSpec, IntLike, Operand


def weights_shape(spec: AttentionSpec, sizes: Sequence[IntLike], heads: IntLike) -> tuple[IntLike, ...]:
    """Of a matrix of weights: (B0, …, q_len, kv_len); (batch indices / heads, q_len, kv_len) of means over ``heads`` that are
    not 0."""
    batch = tuple(sizes[: spec.batch])
    return (*(batch if heads == 0 else (math.prod(batch) // heads,)), *sizes[spec.batch : spec.batch + 2])


@cache
def gradient_spec(spec: AttentionSpec) -> AttentionSpec:
    """sum over k of weight(b, q, k) * grad(b, q, k), whose gradients are those of weights that have the gradient grad.

    Two operands follow those of ``spec``: ones of shape (kv_len, 1), the only feature of values, in the dtype of keys, and
    grad, of ``spec.out_dtype``, over the batch, q and k. The result, which backward calls delta, has the dtype of log-sum-exps.
    """
    ones, grad = len(spec.operands), len(spec.operands) + 1
    batch = [index(f"b{i}") for i in range(spec.batch)]
    gradient = apply("cast", Load(spec.out_dtype, grad, (*batch, index("q"), index("k"))), dtype=spec.weight.dtype)
    return replace(
        spec, operands=(*spec.operands, Operand(2, spec.key.dtype), Operand(spec.batch + 2, spec.out_dtype)), v_dim=1,
        value=Load(spec.key.dtype, ones, (index("k"), index("e"))), out_dtype=spec.lse_dtype,
        weight=apply("mul", spec.weight, gradient, dtype=spec.weight.dtype), out_order=tuple(range(spec.batch + 2)),
    )  # fmt: skip
