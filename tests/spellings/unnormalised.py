"""Attention without a softmax: what multiplies the values is a function of the score, or that divided by its sum."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spellings import rand, spelling

# Of fewer keys nothing would be saved.
LONG = (2, 3, 96, 16)


def distance(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


@spelling(1, shape=LONG)
def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k) - math.log(k.shape[-2])) @ v


@spelling(1, shape=LONG)
def sigmoid_of_minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(distance(q, k) < 0, -math.inf).sigmoid() @ v


@spelling(1, shape=LONG, kv=120)
def sigmoid_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhke->bhqe", torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.2).sigmoid(), v)


@spelling(1, shape=LONG, dtype=torch.bfloat16)
def sigmoid_in_half_precision(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k).float()).to(v.dtype) @ v


@spelling(1, shape=LONG)
def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(scores(q, k)).square().masked_fill(distance(q, k) < 0, 0) @ v / k.shape[-2]


@spelling(1, shape=LONG)
def relu_of_a_mask_that_is_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], k.shape[-2]), -math.inf).triu(1)
    return F.relu(scores(q, k) + mask) @ v


@spelling(1, shape=LONG)
def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    d = distance(q, k)
    return (q @ k.mT * torch.where(d >= 0, 0.9 ** d.clamp(min=0), 0.0)) @ v


@spelling(1, shape=LONG, dtype=torch.bfloat16)
def retention_whose_decay_is_rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    d = distance(q, k)
    return (q @ k.mT * torch.where(d >= 0, 0.9 ** d.clamp(min=0), 0.0).to(q.dtype)) @ v


@spelling(1, shape=LONG)
def retention_of_a_decay_for_each_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As RetNet's: decays of heads, and what the mask hides is a number times zero that could be infinite."""
    decay = torch.log(1 - 2 ** (-5 - torch.arange(3.0)))
    d = distance(q, k)
    mask = torch.exp(d * decay[:, None, None]).masked_fill(d < 0, 0)
    return (q @ k.mT * mask) @ v


@spelling(1, shape=LONG, extra=lambda: ((torch.arange(96) < torch.tensor([50, 90])[:, None]).float(),))
def padding_as_a_factor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k).sigmoid() * mask[:, None, None, :]) @ v


@spelling(1, shape=LONG)
def exponential_that_nothing_divides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(scores(q, k) - 3) @ v


@spelling(1, shape=LONG)
def linear_attention_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * (distance(q, k) >= 0)
    return s @ v / s.sum(-1, keepdim=True)


@spelling(1, shape=LONG)
def weights_divided_by_their_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    s = s.tril()
    return (s / s.sum(-1, keepdim=True)) @ v


@spelling(1, shape=LONG)
def gated_by_a_sigmoid_of_the_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.sigmoid(scores(q, k)) * q.mean(-1, keepdim=True)) @ v


# ----------------------------------------------------------------------------------------------------- what is left alone


class FeedForward(nn.Module):
    """Layers by their weights, of which there are few enough to save scores: of all experts, and of those that are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(rand(3, 8, 96, seed=1)), nn.Parameter(rand(3, 96, 8, seed=2))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        every = torch.bmm(torch.bmm(x.expand(3, -1, -1), self.up * 0.5).relu().square(), self.down).sum(0)
        some = torch.bmm(x.expand(2, -1, -1), self.up[chosen]).relu() @ self.down[chosen]
        return every + some.sum(0) + (x @ self.up[0]).sigmoid() @ self.down[0].mT.contiguous().mT


@spelling(0, inputs=lambda: (FeedForward(), rand(1, 300, 8), torch.tensor([2, 0])))
def feed_forward(layer: FeedForward, x: Tensor, chosen: Tensor) -> Tensor:
    return layer(x, chosen)


@spelling(0)
def too_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k)) @ v


@spelling(0, shape=LONG)
def products_and_a_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which may be computed in another order, in memory that is linear in the length anyway."""
    return (scores(q, k) / k.shape[-2]) @ v


@spelling(0, shape=LONG)
def weights_used_beside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.sigmoid(scores(q, k))
    return p @ v, p


@spelling(0, shape=LONG)
def log_sum_exp_of_the_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Which the result needs of no row."""
    p = torch.sigmoid(scores(q, k))
    return p @ v, p.logsumexp(-1)


@spelling(0, shape=LONG)
def divided_by_another_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.sigmoid(scores(q, k))
    return (p / p.square().sum(-1, keepdim=True)) @ v


@spelling(0, shape=LONG)
def divided_by_the_sum_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.sigmoid(scores(q, k))
    return (p / p.sum(-2, keepdim=True)) @ v


@spelling(shape=LONG)
def multiplied_by_the_largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k).sigmoid()
    return (s * s.amax(-1, keepdim=True)) @ v
