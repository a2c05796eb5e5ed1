"""Where the scale stands, and what it is."""

import math

import torch
from torch import Tensor

from spellings import rand, spelling


def attend(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


@spelling()
def none(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT, v)


@spelling()
def on_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend((q * 0.25) @ k.mT, v)


@spelling()
def on_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ (k / 4).mT, v)


@spelling()
def on_transposed_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ (k.mT * 0.25), v)


@spelling()
def on_both_by_fourth_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = math.sqrt(math.sqrt(16))
    return attend((q / root) @ (k / root).mT, v)


@spelling()
def on_both_by_power(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.25
    return attend((q * scale) @ (k * scale).transpose(2, 3), v)


@spelling()
def on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT / math.sqrt(q.size(-1)), v)


@spelling()
def on_scores_in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(0.25 * (q @ k.mT), v)


@spelling()
def on_scores_inplace(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= 0.25
    return attend(s, v)


@spelling()
def on_scores_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT * 0.5 / 2.0, v)


@spelling()
def as_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT / torch.tensor(4.0), v)


@spelling()
def as_tensor_square_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype)), v)


@spelling()
def as_full_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2: a tensor of no dimensions on the device of the scores."""
    s = q @ k.mT
    return attend(s / torch.full([], v.size(-1) ** 0.5, dtype=s.dtype, device=s.device), v)


@spelling(extra=lambda: (torch.tensor(0.3),))
def learned_scalar(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return attend(q @ k.mT * scale, v)


@spelling(extra=lambda: (torch.tensor([0.3]),))
def learned_scalar_of_one_dimension(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return attend(q @ k.mT * scale, v)


@spelling(extra=lambda: (rand(3, 1, 1, seed=5),))
def learned_per_head(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """Swin v2: clamped and exponentiated per head."""
    return attend(q @ k.mT * scale.clamp(max=math.log(100)).exp(), v)


@spelling(extra=lambda: (rand(16, seed=5),))
def learned_per_feature(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return attend((q * scale) @ k.mT, v)


@spelling(extra=lambda: (rand(2, 1, 9, 1, seed=5),))
def per_query_position(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return attend(q @ k.mT * scale, v)


@spelling(extra=lambda: (torch.tensor(0.3), rand(2, 1, 1, 9, seed=6)))
def tensor_with_mask(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    return attend(q @ k.mT * scale + mask, v)


@spelling()
def cosine_similarity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    return attend(q @ k.mT * 10.0, v)


@spelling()
def after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(9, 9).tril().log()
    return attend((q @ k.mT + mask) * 0.25, v)


@spelling()
def negated_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(-(q @ -k.mT), v)


@spelling()
def on_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT, v * 0.5)


@spelling()
def on_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * 0.5) @ v


@spelling()
def on_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT, v) * 0.5


@spelling(extra=lambda: (rand(3, seed=5),))
def head_gate_on_probabilities(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * gate.view(1, -1, 1, 1)) @ v
