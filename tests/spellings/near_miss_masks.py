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


@spelling(1, extra=zero_one_two)
def filled_where_mask_is_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(mask == 1, -math.inf).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([0, 2]).repeat(41)[:81].view(9, 9),))
def filled_where_mask_of_zero_and_two_is_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(mask == 0, LOWEST).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([0, 2]).repeat(41)[:81].view(9, 9),))
def product_form_with_zero_and_two(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) * mask - 1e4 * (1 - mask)).softmax(-1) @ v


@spelling(1, extra=zero_one_two)
def converted_to_bool(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(mask.bool(), LOWEST).softmax(-1) @ v


@spelling(1, extra=zero_one_two)
def inverted_bits_of_integers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """~1 is -2, which is true."""
    return scores(q, k).masked_fill((~mask).bool(), -5.0).softmax(-1) @ v


@spelling(1)
def fill_of_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), 0.0).softmax(-1) @ v


@spelling(1)
def fill_of_minus_ten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -10.0).softmax(-1) @ v


@spelling(1)
def fill_of_minus_hundred_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * 20 + torch.ones(9, 9).triu(1) * -100).softmax(-1) @ v


@spelling(1)
def positive_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), 1e9).softmax(-1) @ v


@spelling(1)
def tril_leaves_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zero is a score like any other."""
    return scores(q, k).tril().softmax(-1) @ v


@spelling(1)
def scale_after_a_fill_that_it_softens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e4) * 1e-3).softmax(-1) @ v


@spelling(1)
def soft_cap_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The cap brings the masked scores back."""
    s = scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e9)
    return (torch.tanh(s / 5) * 5).softmax(-1) @ v


@spelling(1)
def causal_of_the_other_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).tril(-1).bool(), -math.inf).softmax(-1) @ v


@spelling(1, extra=lambda: (rand(9, 9, seed=5),))
def added_with_alpha(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.add(scores(q, k), mask, alpha=2).softmax(-1) @ v


@spelling(1, extra=lambda: (rand(9, 9, seed=5),))
def subtracted_with_alpha(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.sub(mask, scores(q, k), alpha=3).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor(0.25), rand(2, 1, 1, 9, seed=6)))
def tensor_scale_with_mask(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * scale + mask).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([-1.0]),))
def negative_scale(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.mT * scale).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1) @ v


@spelling(1)
def mask_multiplied_by_negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-inf times a negative number is inf: NaN everywhere but in the last row."""
    s = (q @ k.mT).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    return (s * -0.25).softmax(-1) @ v


@spelling(1)
def infinity_times_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(9, 9).tril()
    return (scores(q, k) + (1 - mask) * -math.inf).softmax(-1) @ v


# ----------------------------------------------------------------------------------------------------- fully masked rows


def rows() -> tuple[Tensor]:
    """True where a key is hidden; rows 0 and 4 see nothing."""
    return ((rand(9, 9, seed=5) > 0) | (torch.arange(9)[:, None] % 4 == 0),)


@spelling(1, extra=rows)
def empty_rows_infinite(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


@spelling(1, extra=rows)
def empty_rows_lowest(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, LOWEST).softmax(-1) @ v


@spelling(1, extra=rows)
def empty_rows_billion(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, -1e9).softmax(-1) @ v


@spelling(0, shape=(9, 16), reason="ScoresUsed", extra=rows)
def keys_of_empty_rows_are_zero(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Without keepdim it is the columns that are left out, of what is no safe softmax."""
    s = scores(q, k).masked_fill(hidden, -math.inf)
    return torch.where((s == -math.inf).all(-1), 0.0, s.softmax(-1)) @ v


@spelling(0, extra=rows)
def empty_rows_billion_by_logsumexp(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """The logarithm of nine is nothing beside a billion: in such a row every probability is one."""
    s = scores(q, k).masked_fill(hidden, -1e9)
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


@spelling(1, extra=rows)
def empty_rows_thousands_added(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return (scores(q, k) + hidden * -1e4).softmax(-1) @ v


@spelling(1, extra=rows)
def empty_rows_of_two_lowest_masks(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """The sum is -inf where both hide, and NaN comes out of such a row."""
    return (scores(q, k) + hidden * LOWEST + hidden.tril() * LOWEST).softmax(-1) @ v


@spelling(1, extra=rows)
def empty_rows_causal_and_left_padding(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    padding = torch.arange(9) < 4
    s = scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), LOWEST)
    return s.masked_fill(padding, LOWEST).softmax(-1) @ v


@spelling(1, extra=rows, dtype=torch.bfloat16)
def empty_rows_lowest_bfloat16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(1, extra=rows, dtype=torch.float16)
def empty_rows_lowest_float16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(1, extra=rows, dtype=torch.bfloat16)
def empty_rows_infinite_bfloat16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


@spelling(1, extra=rows, dtype=torch.bfloat16)
def empty_rows_lowest_of_float32_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """float32's lowest number is -inf in bfloat16, so such a row is NaN."""
    mask = torch.zeros(9, 9).masked_fill(hidden, LOWEST).to(q.dtype)
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(1, dtype=torch.float16)
def float32_fill_in_float16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-1e9 is -inf in float16."""
    mask = torch.ones(9, 9).triu(1).mul(-1e9).to(torch.float16)
    return (scores(q, k) + mask).softmax(-1) @ v


# ------------------------------------------------------------------------------------ masks whose values are not what is usual


def soft_padding() -> tuple[Tensor]:
    return (torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(5)[:18].view(2, 1, 1, 9),)


@spelling(1, extra=soft_padding)
def lowest_times_a_mask_of_halves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(1 - 2) * finfo.min is the largest number, and wins every softmax."""
    return (scores(q, k) + (1 - mask) * LOWEST).softmax(-1) @ v


@spelling(1, extra=soft_padding)
def product_with_a_mask_of_halves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) * mask - 1e4 * (1 - mask)).softmax(-1) @ v


@spelling(1, extra=lambda: (rand(2, 1, 9, 9, seed=5) * 1e4,))
def additive_mask_of_thousands(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([0.0, LOWEST, -math.inf]).repeat(54)[:162].view(2, 1, 9, 9),))
def additive_mask_of_all_kinds(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.full((2, 1, 9, 9), LOWEST).index_fill(2, torch.tensor([1, 5]), -math.inf),))
def additive_mask_that_hides_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Uniform where the fill is finite, NaN where it is not."""
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.zeros(2, 1, 9, 9).index_fill(3, torch.tensor([2]), math.nan),))
def additive_mask_with_nan(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.zeros(2, 1, 9, 9).index_fill(3, torch.tensor([2]), math.inf),))
def additive_mask_with_infinity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.zeros(9, 9).index_fill(1, torch.tensor([2, 3]), LOWEST),))
def additive_mask_multiplied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A negative factor turns what was hidden into what is seen alone."""
    return (-(scores(q, k) + mask)).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.zeros(9, 9).index_fill(1, torch.tensor([2, 3]), LOWEST),))
def additive_mask_softened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((scores(q, k) + mask) * 2e-38).softmax(-1) @ v


@spelling(0, reason="UnsupportedType", extra=lambda: (torch.zeros(9, 9).index_fill(1, torch.tensor([2, 3]), LOWEST),))
def additive_mask_softened_by_a_number_that_kernels_flush(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((scores(q, k) + mask) * 1e-38).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.zeros(9, 9).index_fill(1, torch.tensor([2, 3]), LOWEST),))
def additive_mask_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) + mask).clamp(min=-3.0).softmax(-1) @ v


@spelling(
    1,
    dtype=torch.float16,
    extra=lambda: (torch.zeros(9, 9, dtype=torch.float16).index_fill(1, torch.tensor([2, 3]), -65504.0),),
)
def additive_mask_of_the_lowest_float16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(
    1, dtype=torch.bfloat16, extra=lambda: (torch.zeros(9, 9, dtype=torch.bfloat16).index_fill(0, torch.tensor([2]), -1e4),)
)
def additive_mask_of_ten_thousand_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A row of -1e4: bfloat16 rounds every score in it away."""
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling(
    1, dtype=torch.bfloat16, extra=lambda: (torch.zeros(9, 9, dtype=torch.bfloat16).index_fill(0, torch.tensor([2]), -4e3),)
)
def row_of_thousands_under_a_mask_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same far above what the mask fills in."""
    return (scores(q, k) + bias).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(q.dtype).min).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ conditions that are data


@spelling(1, extra=lambda: (rand(2, 3, 9, 9, seed=5),))
def condition_on_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = torch.where(bias > 0, scores(q, k) + bias, scores(q, k) - 2)
    return s.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1) @ v


@spelling(1, extra=lambda: (rand(2, 3, 9, 9, seed=5),))
def mask_or_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Beyond the diagonal either hidden or biased."""
    above = torch.ones(9, 9).triu(1).bool()
    s = torch.where(above, torch.where(bias > 0, -math.inf, scores(q, k) + bias), scores(q, k))
    return s.softmax(-1) @ v


@spelling(1)
def infinity_against_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """inf - inf is NaN, in the rows where both apply."""
    above, far = torch.ones(9, 9).triu(4).bool(), torch.ones(9, 9).triu(6).bool()
    s = scores(q, k).masked_fill(above, -math.inf)
    return (s + torch.where(far, math.inf, 0.0)).softmax(-1) @ v


@spelling(1)
def hidden_and_lifted_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    above = torch.ones(9, 9).triu(1).bool()
    s = scores(q, k).masked_fill(above, -1e9)
    return (s + torch.where(above, 1e9, 0.0)).softmax(-1) @ v


@spelling(1)
def filled_then_replaced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    return torch.where(s == -math.inf, -0.5, s).softmax(-1) @ v


@spelling(1)
def filled_then_absolute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e4).abs().softmax(-1) @ v


@spelling(1)
def filled_then_inverted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """1 / -inf is -0: like any other score."""
    return (1 / (scores(q, k) + 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)).softmax(-1) @ v


@spelling(1)
def zero_added_before_an_inverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sign of a zero is a sign of infinity."""
    s = torch.where(torch.ones(9, 9).tril(-1).bool(), -0.0, scores(q, k)) + torch.where(
        torch.ones(9, 9).triu(1).bool(), -math.inf, 0.0
    )
    return (1 / s).clamp(-9, 9).softmax(-1) @ v


@spelling(1)
def zero_added_before_an_inverse_that_is_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    above = torch.ones(9, 9).triu(1).bool()
    s = torch.where(torch.ones(9, 9).tril(-1).bool(), -0.0, scores(q, k)) + torch.where(above, -math.inf, 0.0)
    return (1 / s).clamp(-9, 9).masked_fill(above, -math.inf).softmax(-1) @ v


# ----------------------------------------------------------------------------------------------------- integers that wrap


@spelling(1, extra=lambda: (torch.tensor([2**63 - 1, 3]),))
def lengths_without_limit(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    hidden = torch.arange(9) > lengths[:, None, None, None]
    return scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([2**63 - 1, 3]),))
def window_without_limit(q: Tensor, k: Tensor, v: Tensor, window: Tensor) -> Tensor:
    i = torch.arange(9)
    far = (i - i[:, None]).abs() > window[:, None, None, None]
    return scores(q, k).masked_fill(far, -math.inf).softmax(-1) @ v


@spelling(1, inputs=lambda: tuple(rand(1, 1, 300, 8, seed=i) for i in range(3)))
def positions_in_bytes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Position 256 is position 0 again."""
    i = torch.arange(300).to(torch.uint8)
    return scores(q, k).masked_fill(i > i[:, None], -math.inf).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([9, 4], dtype=torch.int32),))
def lengths_in_int32(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    hidden = torch.arange(9, dtype=torch.int32) >= lengths[:, None, None, None]
    return scores(q, k).masked_fill(hidden, LOWEST).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([2**32 + 4, 3]),))
def lengths_that_wrap_in_int32(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """2^32 + 4 is 4."""
    hidden = torch.arange(9) >= lengths.to(torch.int32).to(torch.int64)[:, None, None, None]
    return scores(q, k).masked_fill(hidden, LOWEST).softmax(-1) @ v


@spelling(1)
def positions_that_wrap_in_int32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """8 * 2^28 is -2^31."""
    seen = (torch.arange(9) * 2**28).int().long() + 0 * torch.arange(9)[:, None] < 0
    return scores(q, k).masked_fill(~seen, LOWEST).softmax(-1) @ v


@spelling(0, reason="IntegersWrap")
def positions_that_wrap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """8 * 2^60 is -2^63."""
    seen = torch.arange(9) * 2**60 + 0 * torch.arange(9)[:, None] < 0
    return scores(q, k).masked_fill(~seen, LOWEST).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([200, 100], dtype=torch.uint8),))
def sum_of_bytes_wraps(q: Tensor, k: Tensor, v: Tensor, one: Tensor) -> Tensor:
    """200 + 100 is 44."""
    limit = (one.sum(dtype=torch.uint8) + torch.tensor(0, dtype=torch.uint8)) // 8
    return scores(q, k).masked_fill(torch.arange(9) > limit, -math.inf).softmax(-1) @ v


@spelling(1)
def block_size_negative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    return scores(q, k).masked_fill(i[:, None] // -4 != i // -4, -math.inf).softmax(-1) @ v


@spelling(1)
def keys_in_falling_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bound that decreases with the query is none."""
    i = torch.arange(9)
    return scores(q, k).masked_fill(i > 8 - i[:, None], -math.inf).softmax(-1) @ v


@spelling(1)
def blocks_of_keys_in_falling_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    return scores(q, k).masked_fill(i > 8 - i[:, None] // 2, -math.inf).softmax(-1) @ v


@spelling(1, extra=lambda: (torch.tensor([3, 0, 5, 1, 8, 2, 7, 4, 6]),))
def causal_by_unsorted_positions(q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
    return scores(q, k).masked_fill(place > place[:, None], -math.inf).softmax(-1) @ v
