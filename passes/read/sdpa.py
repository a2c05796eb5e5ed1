"""F.scaled_dot_product_attention as the products that its documentation defines it by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuse.torch_private import safe_softmax


def sdpa_as_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query (..., L, E), key (..., S, E), value (..., S, Ev) → (..., L, Ev).

    Source: the reference implementation in the documentation of torch.nn.functional.scaled_dot_product_attention, with
    ``_safe_softmax``, which every backend of it follows: a row without a finite score gives zeros.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    score = query @ key.transpose(-2, -1)
    if score.dtype == torch.float16:  # as kernels have it: a mask of the lowest number would be infinite beside a score
        score = score.to(torch.float32)
    score = score * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        rows = torch.arange(query.size(-2), device=query.device)[:, None]
        attn_mask = torch.arange(key.size(-2), device=query.device)[None, :] <= rows
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        score = torch.where(attn_mask, score, float("-inf"))
    elif attn_mask is not None:
        score = score + attn_mask
    weight = safe_softmax(score, -1).to(value.dtype)
    if dropout_p > 0.0:
        weight = torch.dropout(weight, dropout_p, train=True)
    out: Tensor = weight @ value
    return out
