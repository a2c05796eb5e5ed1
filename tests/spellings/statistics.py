"""Scores that read what was made of all scores: continuously, so that the graph may compute it, or by a choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spellings import named, rand, spelling


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


@spelling(2, inputs=lambda: (rand(2, 3, 9, 16), rand(2, 3, 12, 16, seed=1), torch.arange(12) < 9))
def maximum_of_all_below_a_clamp(images: Tensor, texts: Tensor, there: Tensor) -> tuple[Tensor, ...]:
    """Grounding DINO: what is clamped is no longer the scores less a number."""
    s = images @ texts.mT
    s = (s - s.max()).clamp(-50000, 50000)
    other = s.mT
    other = (other - other.max(-1, keepdim=True)[0]).clamp(-50000, 50000)
    others = other.softmax(-1) @ images
    s.masked_fill_(~there, float("-inf"))
    return s.softmax(-1) @ texts, others


for _name, _read in {
    "mean": lambda s: s - s.mean(-1, keepdim=True).tanh(),
    "largest_of_the_head": lambda s: s / s.amax((-1, -2), keepdim=True),
    "number_above_zero": lambda s: s * (s > 0).float().mean(-1, keepdim=True),
    "sum_over_queries": lambda s: s + s.sum(-2, keepdim=True).sigmoid(),
    "choice_by_row": lambda s: torch.where(s.mean(-1, keepdim=True) > 0, s, 2 * s),
}.items():  # fmt: skip

    def _program(q: Tensor, k: Tensor, v: Tensor, read=_read) -> Tensor:  # type: ignore[no-untyped-def]
        return read(scores(q, k)).softmax(-1) @ v  # type: ignore[no-any-return]

    spelling()(named(_program, f"scores_and_their_{_name}"))


for _name, _read in {
    "kink_at_the_largest": lambda s: F.relu(s - s.amax(-1, keepdim=True) + 1),
    "bound_at_the_largest": lambda s: (s - s.amax(-1, keepdim=True)).clamp(max=0) * 2,
    "root_at_the_largest": lambda s: (s.amax(-1, keepdim=True) - s).sqrt(),
    "pole_at_the_largest": lambda s: 1 / (s.amax(-1, keepdim=True) - s + 1e-3),
    "choice_of_the_largest": lambda s: torch.where(s == s.amax(-1, keepdim=True), s, 2 * s),
    "order": lambda s: s + s.sort(-1).values,
    "places": lambda s: s + s.argmax(-1, keepdim=True),
}.items():  # fmt: skip

    def _program(q: Tensor, k: Tensor, v: Tensor, read=_read) -> Tensor:  # type: ignore[no-untyped-def]
        """The kernel's scores are not to the last bit those that this was made of."""
        return read(scores(q, k)).softmax(-1) @ v  # type: ignore[no-any-return]

    spelling(0, reason="ScoresUsed")(named(_program, f"scores_and_their_{_name}"))


@spelling(0, shape=(2, 3, 1, 16), kv=9, reason="NothingSaved")
def maximum_of_one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its scores are no more than a number of each key."""
    s = scores(q, k)
    return (s - s.max()).clamp(-50000, 50000).softmax(-1) @ v
