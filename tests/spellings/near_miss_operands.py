"""What reads queries, keys and values in a way that looks like attention and is another function."""

import torch
from torch import Tensor

from spellings import rand, spelling


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


@spelling(1, shape=(2, 9, 9, 9))
def key_permuted_wrongly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.permute(0, 3, 2, 1)).softmax(-1) @ v


@spelling(1, shape=(2, 3, 9, 9))
def key_not_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k).softmax(-1) @ v


@spelling(1, shape=(2, 2, 9, 16))
def heads_and_batch_swapped_in_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v.transpose(0, 1)


@spelling(1, shape=(2, 9, 9, 16))
def heads_and_positions_not_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the heads of each position: right or a slip, it is what was asked for."""
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@spelling(1)
def keys_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k.roll(1, -2)).softmax(-1) @ v


@spelling(1)
def keys_reversed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k.flip(-2)).softmax(-1) @ v


@spelling(1)
def key_scaled_per_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k * torch.arange(9.0)[:, None]).mT).softmax(-1) @ v


@spelling(0)
def distances_not_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


@spelling(0)
def additive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bahdanau: tanh of a sum instead of a product."""
    return torch.tanh(q[:, :, :, None] + k[:, :, None]).sum(-1).softmax(-1) @ v


@spelling(0)
def additive_attention_by_a_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is summed over is features, not heads."""
    return (torch.tanh((q @ k[0, 0, :8].mT)[:, :, :, None] + (k @ q[0, 0, :8].mT)[:, :, None]) @ v[0, 0, 0, :8]).softmax(-1) @ v


@spelling(0)
def synthesizer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores that are parameters."""
    return rand(9, 9, seed=5, dtype=v.dtype).softmax(-1) @ v


@spelling(1, extra=lambda: (rand(16, 9, seed=5),))
def dense_synthesizer(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return (q @ weight).softmax(-1) @ v


@spelling()
def product_minus_its_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.mean()).softmax(-1) @ v
