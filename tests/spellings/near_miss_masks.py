"""Masks that are not what they look like, and rows that see nothing: the result is eager's, fused or declined."""

import math

import torch
from torch import Tensor

from spellings import rand, spelling

LOWEST = torch.finfo(torch.float32).min


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


# ------------------------------------------------------------------------------------------------------------- the masks


def zero_one_two() -> tuple[Tensor]:
    return (torch.arange(81).reshape(9, 9) % 3,)


@spelling(None, extra=zero_one_two)
def filled_where_mask_is_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(mask == 1, -math.inf).softmax(-1) @ v


@spelling(None, extra=lambda: (torch.tensor([0, 2]).repeat(41)[:81].view(9, 9),))
def filled_where_mask_of_zero_and_two_is_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(mask == 0, LOWEST).softmax(-1) @ v


@spelling(None, extra=lambda: (torch.tensor([0, 2]).repeat(41)[:81].view(9, 9),))
def product_form_with_zero_and_two(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) * mask - 1e4 * (1 - mask)).softmax(-1) @ v


@spelling(None, extra=zero_one_two)
def converted_to_bool(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(mask.bool(), LOWEST).softmax(-1) @ v


@spelling(None, extra=zero_one_two)
def inverted_bits_of_integers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """~1 is -2, which is true."""
    return scores(q, k).masked_fill((~mask).bool(), -5.0).softmax(-1) @ v


@spelling(None)
def fill_of_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), 0.0).softmax(-1) @ v


@spelling(None)
def fill_of_minus_ten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -10.0).softmax(-1) @ v


@spelling(None)
def fill_of_minus_hundred_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * 20 + torch.ones(9, 9).triu(1) * -100).softmax(-1) @ v


@spelling(None)
def positive_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), 1e9).softmax(-1) @ v


@spelling(None)
def tril_leaves_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zero is a score like any other."""
    return scores(q, k).tril().softmax(-1) @ v


@spelling(None)
def scale_after_a_fill_that_it_softens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e4) * 1e-3).softmax(-1) @ v


@spelling(None)
def soft_cap_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The cap brings the masked scores back."""
    s = scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e9)
    return (torch.tanh(s / 5) * 5).softmax(-1) @ v


@spelling(None)
def causal_of_the_other_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).tril(-1).bool(), -math.inf).softmax(-1) @ v


@spelling(None, extra=lambda: (rand(9, 9, seed=5),))
def added_with_alpha(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.add(scores(q, k), mask, alpha=2).softmax(-1) @ v


@spelling(None, extra=lambda: (rand(9, 9, seed=5),))
def subtracted_with_alpha(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.sub(mask, scores(q, k), alpha=3).softmax(-1) @ v


@spelling(None, extra=lambda: (torch.tensor(0.25), rand(2, 1, 1, 9, seed=6)))
def tensor_scale_with_mask(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * scale + mask).softmax(-1) @ v


@spelling(None, extra=lambda: (torch.tensor([-1.0]),))
def negative_scale(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.mT * scale).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1) @ v


@spelling(None)
def mask_multiplied_by_negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-inf times a negative number is inf: NaN everywhere but in the last row."""
    s = (q @ k.mT).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    return (s * -0.25).softmax(-1) @ v


@spelling(None)
def infinity_times_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(9, 9).tril()
    return (scores(q, k) + (1 - mask) * -math.inf).softmax(-1) @ v


# ----------------------------------------------------------------------------------------------------- fully masked rows


def rows() -> tuple[Tensor]:
    """True where a key is hidden; rows 0 and 4 see nothing."""
    return ((rand(9, 9, seed=5) > 0) | (torch.arange(9)[:, None] % 4 == 0),)


@spelling(None, extra=rows)
def empty_rows_infinite(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


@spelling(None, extra=rows)
def empty_rows_lowest(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, LOWEST).softmax(-1) @ v


@spelling(None, extra=rows)
def empty_rows_billion(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, -1e9).softmax(-1) @ v


@spelling(None, extra=rows)
def empty_rows_thousands_added(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return (scores(q, k) + hidden * -1e4).softmax(-1) @ v


@spelling(None, extra=rows)
def empty_rows_of_two_lowest_masks(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """The sum is -inf where both hide, and NaN comes out of such a row."""
    return (scores(q, k) + hidden * LOWEST + hidden.tril() * LOWEST).softmax(-1) @ v


@spelling(None, extra=rows)
def empty_rows_causal_and_left_padding(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    padding = torch.arange(9) < 4
    s = scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), LOWEST)
    return s.masked_fill(padding, LOWEST).softmax(-1) @ v


@spelling(None, extra=rows, dtype=torch.bfloat16)
def empty_rows_lowest_bfloat16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(None, extra=rows, dtype=torch.float16)
def empty_rows_lowest_float16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(None, extra=rows, dtype=torch.bfloat16)
def empty_rows_infinite_bfloat16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


@spelling(None, extra=rows, dtype=torch.bfloat16)
def empty_rows_lowest_of_float32_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """float32's lowest number is -inf in bfloat16, so such a row is NaN."""
    mask = torch.zeros(9, 9).masked_fill(hidden, LOWEST).to(q.dtype)
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(None, dtype=torch.float16)
def float32_fill_in_float16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-1e9 is -inf in float16."""
    mask = torch.ones(9, 9).triu(1).mul(-1e9).to(torch.float16)
    return (scores(q, k) + mask).softmax(-1) @ v
