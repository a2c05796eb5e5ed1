"""Weights that are a sum: an attention for each term that is one, and what is none beside it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spellings import rand, spelling


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Of half of the features, causal."""
    s = q @ k.mT / 3
    return s.masked_fill(torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, -math.inf).softmax(-1)


def halves(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return weights(q[..., :8], k[..., :8]), weights(q[..., 8:], k[..., 8:])


def per_head() -> tuple[Tensor]:
    return (rand(3, 1, 1, seed=5),)


@spelling(2)
def difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    return (a - 0.3 * b) @ v


@spelling(2, extra=per_head)
def difference_by_head_in_place(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    a, b = halves(q, k)
    a -= factor * b
    return a @ v


@spelling(2, extra=lambda: tuple(rand(8, seed=n) / 4 for n in range(5, 9)))
def differential_transformer(q: Tensor, k: Tensor, v: Tensor, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor) -> Tensor:
    """As its authors write it: one softmax over twice as many heads."""
    q, k = (x.unflatten(-1, (2, 8)).permute(0, 1, 3, 2, 4).flatten(1, 2) for x in (q, k))
    p = weights(q, k).unflatten(1, (3, 2))
    factor = torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + 0.8
    return (p[:, :, 0] - factor * p[:, :, 1]) @ v


@spelling(2, dtype=torch.bfloat16)
def difference_in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    return (a - 0.5 * b) @ v


@spelling(3, extra=per_head)
def mixture_of_three(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    a, b = halves(q, k)
    g = gate.sigmoid()
    p = (1 - g) * a + g * (b + weights(k, q)) * 0.5
    return torch.einsum("bhqk,bhkd->bqhd", p, v)


@spelling(2, extra=lambda: (rand(2, 3, 9, 1, seed=5),))
def gate_of_each_query_over_two_softmaxes(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    a, b = halves(q, k)
    return (torch.sigmoid(gate) * a + b) @ v


@spelling(extra=per_head)
def content_and_position(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """ConViT without its second normalisation; the weights of positions are no attention."""
    i = torch.arange(9)
    position = (-(i[:, None] - i).abs() * rand(3, 1, 1, seed=7).to(q.dtype).exp()).softmax(-1)
    g = torch.sigmoid(gate)
    return ((1 - g) * weights(q, k) + g * position) @ v


@spelling(extra=lambda: (rand(3, seed=5), rand(3, 9, 9, seed=6)))
def convit(q: Tensor, k: Tensor, v: Tensor, gating: Tensor, position: Tensor) -> Tensor:
    """Divided by their sum again, which is that of the gates."""
    patch = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
    position = position.expand(2, -1, -1, -1).softmax(-1)
    gating = gating.view(1, -1, 1, 1)
    p = (1.0 - torch.sigmoid(gating)) * patch + torch.sigmoid(gating) * position
    p /= p.sum(-1).unsqueeze(-1)
    return (p @ v).transpose(1, 2).reshape(2, 9, 48)


@spelling(2, extra=per_head)
def two_softmaxes_normalised_again(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    a, b = halves(q, k)
    p = a + gate.exp() * b
    return p / p.sum(-1, keepdim=True) @ v


@spelling()
def weights_and_the_mean_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (weights(q, k) + 1 / 9) @ v


@spelling(extra=lambda: (rand(9, 9, seed=5),))
def weights_and_a_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (weights(q, k) + table) @ v


@spelling(2)
def sum_masked_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    p = (a + b).masked_fill(torch.eye(9) == 1, 0.0)
    return p.to(v.dtype) @ v


@spelling(2, random=True)
def difference_with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    return F.dropout(a - 0.3 * b, 0.25, True) @ v


# ---------------------------------------------------------------------------------------------------- what is left alone


@spelling(0, reason="RandomNumbers", random=True)
def a_table_dropped_out_with_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both lack the same entries: what draws them cannot be had twice."""
    return F.dropout(weights(q, k) + torch.eye(9), 0.25, True) @ v


@spelling(0, reason="ProbabilitiesUsed")
def difference_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    a, b = halves(q, k)
    return (a - 0.3 * b) @ v, b


@spelling(0, reason="WeightNotLinear", extra=lambda: (rand(9, 9, seed=5).sigmoid(),))
def weights_and_a_table_normalised_again(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """What a table adds to a row is not the same in all of them."""
    p = weights(q, k) + table
    return p / p.sum(-1, keepdim=True) @ v


@spelling(0, reason="SeveralSoftmaxes")
def difference_above_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = halves(q, k)
    return (a - 0.3 * b).relu() @ v
