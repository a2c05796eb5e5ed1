"""Masks: filled, added, multiplied, computed, given, one or many, in any order."""

import math

import torch
from torch import Tensor

from spellings import rand, spelling

LOWEST = torch.finfo(torch.float32).min


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


def attend(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


def padding() -> tuple[Tensor]:
    """True where a token is."""
    return (torch.arange(9) < torch.tensor([[9], [6]]),)


def dense() -> tuple[Tensor]:
    return ((rand(2, 1, 9, 9, seed=5) > -1).logical_or(torch.eye(9).bool()),)


def additive() -> tuple[Tensor]:
    return (rand(2, 1, 9, 9, seed=5),)


# ------------------------------------------------------------------------------------------------------------- causal


@spelling()
def causal_tril_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nanoGPT before SDPA."""
    return attend(scores(q, k).masked_fill(torch.tril(torch.ones(9, 9)) == 0, float("-inf")), v)


@spelling()
def causal_triu_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(torch.triu(torch.ones(9, 9, dtype=torch.bool), diagonal=1), -1e9), v)


@spelling()
def causal_triu_of_infinities_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own generate_square_subsequent_mask."""
    return attend(scores(q, k) + torch.nn.Transformer.generate_square_subsequent_mask(9), v)


@spelling()
def causal_full_triu_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama's reference code."""
    return attend(scores(q, k) + torch.full((9, 9), -math.inf).triu(1), v)


@spelling(extra=lambda: (torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32),))
def causal_buffer_slice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(bias[:, :, :9, :9] == 0, -math.inf), v)


@spelling(extra=lambda: (torch.tril(torch.ones(32, 32, dtype=torch.uint8)).view(1, 1, 32, 32),))
def causal_byte_buffer_where(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """GPT-2 before 2022."""
    return attend(torch.where(bias[:, :, :9, :9].bool(), scores(q, k), torch.tensor(-1e4)), v)


@spelling()
def causal_arange_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(torch.where(i[:, None] >= i[None, :], scores(q, k), -math.inf), v)


@spelling(dtype=torch.bfloat16)
def number_held_in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """3 * 0.3 is more than 0.9 where 0.3 is a tensor's; a number in a program is not rounded before the product."""
    i = torch.arange(9, dtype=torch.bfloat16)
    all_of_them = i[:, None] * torch.full((), 0.3, dtype=torch.bfloat16) == 0.90234375
    return attend(scores(q, k).masked_fill(~(all_of_them | (i[:, None] >= i)), -math.inf), v)


@spelling()
def tenths_by_floor_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """1 / 0.1 is rounded up to 10, but 0.1 goes into 1 nine times only."""
    i = torch.arange(9.0)
    tenths = torch.div(i, 0.1, rounding_mode="floor")
    return attend(scores(q, k).masked_fill(tenths[:, None] < 10 * i, -math.inf), v)


@spelling(shape=(1, 2, 40, 16))
def cut_before_it_is_rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A quotient by a number just below a whole one is cut in float32, though bfloat16 would round it up."""
    i = torch.arange(40, dtype=torch.bfloat16)
    block = torch.div(i, 1.0026, rounding_mode="trunc")
    return attend(scores(q, k).masked_fill(block[:, None] < i, -math.inf), v)


@spelling()
def causal_arange_negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k).masked_fill(~(i.unsqueeze(0) <= i.unsqueeze(1)), LOWEST), v)


@spelling()
def causal_double_negation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.logical_not(torch.ones(9, 9, dtype=torch.bool).triu(1))
    return attend(scores(q, k).masked_fill(~keep, -math.inf), v)


@spelling(kv=14)
def causal_offset_by_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(9, 14, dtype=torch.bool).tril(diagonal=14 - 9)
    return attend(scores(q, k).masked_fill(keep.logical_not(), -math.inf), v)


@spelling()
def causal_inplace(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s.masked_fill_(torch.ones_like(s[0, 0], dtype=torch.bool).triu_(1), -math.inf)
    return attend(s, v)


@spelling()
def causal_by_cumsum_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.ones(2, 9, dtype=torch.long).cumsum(-1)
    return attend(scores(q, k).masked_fill((position[:, None, :, None] < position[:, None, None, :]), -math.inf), v)


@spelling(0)
def causal_by_setitem(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[:, :, torch.ones(9, 9).triu(1).bool()] = -math.inf
    return attend(s, v)


@spelling()
def causal_product_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first GPT: s * b - 1e4 * (1 - b)."""
    b = torch.tril(torch.ones(9, 9))
    return attend(scores(q, k) * b - 1e4 * (1 - b), v)


@spelling()
def causal_product_plus_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = torch.tril(torch.ones(9, 9))
    return attend(scores(q, k) * b + -1e9 * (1 - b), v)


@spelling()
def causal_by_log(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k) + torch.ones(9, 9).tril().log(), v)


@spelling(0)
def causal_masked_after_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeroed after exp, before the sum."""
    e = scores(q, k).exp() * torch.ones(9, 9).tril()
    return e / e.sum(-1, keepdim=True) @ v


# ------------------------------------------------------------------------------------------------- windows and others


@spelling()
def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    distance = i[:, None] - i[None, :]
    return attend(scores(q, k).masked_fill((distance < 0) | (distance >= 4), -math.inf), v)


@spelling()
def window_of_two_triangles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ones = torch.ones(9, 9, dtype=torch.bool)
    return attend(torch.where(ones.tril() & ones.triu(-3), scores(q, k), LOWEST), v)


@spelling()
def window_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k).masked_fill((i[:, None] - i).abs() > 2, LOWEST), v)


@spelling()
def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k).masked_fill(i[:, None] // 4 != i[None, :] // 4, -math.inf), v)


@spelling()
def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    distance = i[:, None] - i
    return attend(torch.where((distance >= 0) & (distance % 2 == 0), scores(q, k), -math.inf), v)


@spelling()
def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(torch.where((i[None] <= i[:, None]) | (i[None] < 3), scores(q, k), -math.inf), v)


@spelling(extra=lambda: (torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]]),))
def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill((ids[:, :, None] != ids[:, None, :])[:, None], -math.inf), v)


# ------------------------------------------------------------------------------------------------------ given as input


@spelling(extra=padding)
def padding_masked_fill(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(~keep[:, None, None, :], -math.inf), v)


@spelling(extra=padding)
def padding_as_integers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = keep.long()
    return attend(scores(q, k).masked_fill(mask.unsqueeze(1).unsqueeze(2) == 0, -1e9), v)


@spelling(extra=padding)
def padding_extended(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """BERT: (1 - mask) * finfo.min, added."""
    mask = (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return attend(scores(q, k) + mask, v)


@spelling(extra=padding)
def padding_of_queries_and_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Padded rows average; nobody reads them."""
    both = keep[:, None, :, None] & keep[:, None, None, :]
    return attend(scores(q, k).masked_fill(~both, LOWEST), v)


@spelling(extra=padding)
def padding_outer_product(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = keep.float()
    return attend(scores(q, k).masked_fill((mask.unsqueeze(-1) @ mask.unsqueeze(-2)).unsqueeze(1) == 0, LOWEST), v)


@spelling(extra=padding)
def padding_expanded_view_as(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """DistilBERT."""
    s = scores(q, k)
    mask = (keep == 0).view(2, 1, 1, 9).expand_as(s)
    return attend(s.masked_fill(mask, torch.tensor(LOWEST)), v)


@spelling(extra=lambda: (torch.tensor([9, 6]),))
def padding_from_lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    keep = torch.arange(9)[None] < lengths[:, None]
    return attend(scores(q, k).masked_fill(~keep[:, None, None], -math.inf), v)


@spelling(extra=dense)
def dense_where(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return attend(torch.where(keep, scores(q, k), torch.full_like(scores(q, k), -math.inf)), v)


@spelling(extra=dense)
def dense_where_method(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return attend(scores(q, k).where(keep, torch.tensor(LOWEST)), v)


@spelling(extra=dense)
def dense_converted_to_additive(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = torch.zeros(2, 1, 9, 9).masked_fill(~keep, -math.inf)
    return attend(scores(q, k) + bias, v)


@spelling(extra=dense)
def dense_filled_inplace_zeros(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """What the documentation of SDPA gives as its reference."""
    bias = torch.zeros(2, 1, 9, 9)
    bias.masked_fill_(keep.logical_not(), float("-inf"))
    s = scores(q, k)
    s += bias
    return attend(s, v)


@spelling(extra=additive)
def added_after_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(scores(q, k) + mask, v)


@spelling(extra=additive)
def added_in_front(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(mask + scores(q, k), v)


@spelling(extra=additive)
def added_before_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend((q @ k.mT + mask) / 4, v)


@spelling(extra=additive)
def added_inplace(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores(q, k)
    s += mask
    return attend(s, v)


@spelling(extra=additive)
def subtracted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(scores(q, k) - mask, v)


@spelling(extra=additive)
def added_with_alpha(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(torch.add(scores(q, k), mask, alpha=2), v)


@spelling(extra=lambda: (rand(9, seed=5),))
def added_per_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(scores(q, k) + mask, v)


@spelling(extra=lambda: (rand(2, 1, 12, 12, seed=5),))
def added_slice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(scores(q, k) + mask[:, :, :9, -9:], v)


@spelling(dtype=torch.bfloat16, extra=additive)
def added_in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores(q, k) + mask
    return attend(s, v.to(s.dtype)).to(q.dtype)


# ---------------------------------------------------------------------------------------------------- several at a time


@spelling(extra=padding)
def causal_and_padding_filled_in_turn(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    return attend(s.masked_fill(~keep[:, None, None], -math.inf), v)


@spelling(extra=padding)
def causal_and_padding_combined(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & keep[:, None, None]
    return attend(scores(q, k).masked_fill(mask == False, LOWEST), v)  # noqa: E712


@spelling(extra=padding)
def causal_and_padding_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    causal = torch.full((9, 9), LOWEST).triu(1)
    pad = (1.0 - keep[:, None, None].float()) * LOWEST
    return attend(scores(q, k) + causal + pad, v)


@spelling(extra=padding)
def causal_and_padding_in_one_additive_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """OPT and its kin: the padding is filled into the expanded causal mask."""
    mask = torch.full((9, 9), LOWEST).triu(1).expand(2, 1, 9, 9).clone()
    mask = mask.masked_fill(~keep[:, None, None].expand(2, 1, 9, 9), LOWEST)
    return attend(scores(q, k) + mask, v)


@spelling(extra=padding)
def maximum_with_lowest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = torch.full((9, 9), LOWEST).triu(1) + (1.0 - keep[:, None, None].float()) * LOWEST
    return attend(torch.max(scores(q, k) + mask, torch.tensor(LOWEST)), v)


@spelling(extra=lambda: (*padding(), rand(2, 1, 9, 9, seed=5), rand(3, 9, 9, seed=6)))
def four_masks(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor, heads: Tensor) -> Tensor:
    s = scores(q, k) + bias
    s = s.masked_fill(torch.ones(9, 9).triu(1) > 0, -math.inf) + heads
    return attend(torch.where(keep[:, None, None], s, -math.inf), v)


@spelling(2, extra=padding)
def built_once_read_by_two_layers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = torch.zeros(2, 1, 9, 9).masked_fill(~(keep[:, None, None] & torch.ones(9, 9).tril().bool()), LOWEST)
    x = attend(scores(q, k) + mask, v)
    return attend(scores(x, k) + mask, v)
