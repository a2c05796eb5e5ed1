"""Models whose sequence lies on several ranks: masks, layers of attention, and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

RANKS, TEXTS, LENGTH, WIDTH, HEADS, GROUPS = 2, 2, 48, 32, 4, 2
Places = tuple[Any, ...]  # position ids, documents, which are no padding; a BlockMask for FlexAttention
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of query and key positions, documents and kept ones


def causal(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return (k <= q)[None, None]


def window(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return ((k <= q) & (q - k < 7))[None, None]


def both_sides(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return ((q - k).abs() < 9)[None, None]


def of_documents(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return causal(q, k, documents, kept) & (documents[:, None, :, None] == documents[:, None, None])


def padded(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return causal(q, k, documents, kept) & kept[:, None, None]


def before(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return (k < q)[None, None]


PREFIX = torch.tensor([5, 30])  # of each text, the second over the border of two shards


def prefix(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return causal(q, k, documents, kept) | (k < PREFIX[:, None, None, None])


def everything(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return torch.ones_like(k <= q)[None, None]


Weigh = Callable[[Tensor, Tensor], Tensor]  # weights, of scores and of how far the key is behind the query


def softmax(score: Tensor, distance: Tensor) -> Tensor:
    return score.softmax(-1)


def sigmoid(score: Tensor, distance: Tensor) -> Tensor:
    return (score - 3).sigmoid()


def squared_relu(score: Tensor, distance: Tensor) -> Tensor:
    return score.relu() ** 2 / 48


def retention(score: Tensor, distance: Tensor) -> Tensor:
    return score * 0.9 ** distance.to(score.dtype) / 16


def share(score: Tensor, distance: Tensor) -> Tensor:
    """Of scores that are positive, or hidden."""
    return score / score.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Case:
    """
    fill      of what is hidden
    bias      that a position of distance takes off
    sink      a logit without a value
    positive  queries and keys are
    flex      FlexAttention says it, of causal documents
    """

    mask: Mask
    fill: float = -torch.inf
    bias: float = 0.0
    sink: bool = False
    dtype: torch.dtype = torch.float32
    weigh: Weigh = softmax
    positive: bool = False
    flex: bool = False


LOWEST = torch.finfo(torch.float32).min
CASES = {
    "causal": Case(causal, bias=0.1),
    "window": Case(window, LOWEST),
    "both sides": Case(both_sides),
    "documents": Case(of_documents),
    "padding, hidden by the lowest number": Case(padded, LOWEST),
    "before, hidden by the lowest number": Case(before, LOWEST),  # the first query sees nothing, so all
    "everything": Case(everything),
    "sink": Case(window, sink=True),
    "bfloat16": Case(window, dtype=torch.bfloat16),
    "prefix": Case(prefix),
    "FlexAttention": Case(of_documents, bias=0.1, flex=True),
    "sigmoid": Case(of_documents, weigh=sigmoid),
    "squared ReLU": Case(window, weigh=squared_relu),
    "retention": Case(causal, 0.0, weigh=retention),
    "a share of positive scores": Case(causal, 0.0, weigh=share, positive=True),
}


class Attention(nn.Module):
    """With grouped queries, and keys and values that one layer gives."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.memory = nn.Linear(WIDTH, 2 * GROUPS * (WIDTH // HEADS))
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        _, documents, kept, *masks = places
        q = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.memory(x).unflatten(-1, (2, GROUPS, -1)).permute(2, 0, 3, 1, 4).repeat_interleave(HEADS // GROUPS, 2)
        if self.case.positive:
            q, k = q.sigmoid(), k.sigmoid()
        at = torch.arange(x.shape[1])
        if self.case.flex:
            return x + self.out(self._flex(q, k, v, masks[0]).transpose(1, 2).flatten(2))
        score = q @ k.mT * (WIDTH // HEADS) ** -0.5 - self.case.bias * (at[:, None] - at).to(x.dtype)
        score = score.masked_fill(~self.case.mask(at[:, None], at, documents, kept), self.case.fill)
        if self.case.sink:
            score = torch.cat((score, self.sink[None, :, None, None].expand(*score.shape[:3], 1)), -1)
        weights = self.case.weigh(score, at[:, None] - at)[..., : k.shape[2]]
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + mixed

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        def nearer(score: Tensor, text: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - 0.1 * (q - k)

        result: Tensor = flex_attention(q, k, v, score_mod=nearer, block_mask=mask)
        return result


def block_mask(documents: Tensor, length: int) -> BlockMask:
    """Of causal documents, for as many positions."""

    def seen(text: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (documents[text, q] == documents[text, k])

    return create_block_mask(seen, len(documents), None, length, length, device="cpu")


class Layers(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first, self.second = Attention(case), Attention(case)
        self.norm, self.places = nn.LayerNorm(WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.ahead = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        x = self.first(x + self.places(places[0]), places)
        result: Tensor = self.second(x + self.ahead(self.norm(x)), places)
        return result


def batch() -> tuple[Tensor, Places]:
    positions = torch.arange(LENGTH)
    kept = torch.ones(TEXTS, LENGTH, dtype=torch.bool)
    kept[1, :5] = False
    return torch.randn(TEXTS, LENGTH, WIDTH), (
        positions.expand(TEXTS, -1),
        torch.stack((positions // 11, positions // 29)),
        kept,
    )
