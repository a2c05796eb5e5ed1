"""The normalisation: every way to write softmax over the keys."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spellings import rand, spelling


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


@spelling()
def functional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores(q, k), dim=-1) @ v


@spelling()
def torch_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), 3) @ v


@spelling()
def method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


@spelling()
def special(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.special.softmax(scores(q, k), dim=-1) @ v


@spelling()
def module(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return nn.Softmax(dim=-1)(scores(q, k)) @ v


@spelling(shape=(9, 16))
def without_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(1) @ v


@spelling(dtype=torch.bfloat16)
def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(dtype=torch.float16)
def scores_cast_to_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).float().softmax(-1).type_as(v) @ v


@spelling(dtype=torch.bfloat16)
def everything_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q.float(), k.float()).softmax(-1) @ v.float()).to(q.dtype)


@spelling()
def exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / e.sum(-1, keepdim=True) @ v


@spelling()
def exp_times_reciprocal_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k))
    return e * (1 / e.sum(dim=-1, keepdim=True)) @ v


@spelling()
def exp_over_unsqueezed_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k))
    return torch.div(e, torch.sum(e, -1).unsqueeze(-1)) @ v


@spelling()
def exp_minus_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.max(dim=-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True) @ v


@spelling()
def exp_minus_amax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / torch.sum(e, dim=-1, keepdim=True) @ v


@spelling()
def exp_minus_detached_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - torch.max(s, dim=-1, keepdim=True)[0].detach())
    return e / e.sum(-1, True) @ v


@spelling()
def exp_minus_global_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Any number that is the same for a whole row cancels."""
    s = scores(q, k)
    e = torch.exp(s - s.max())
    return e / e.sum(-1, keepdim=True) @ v


@spelling()
def inplace(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s -= s.amax(-1, keepdim=True)
    s.exp_()
    s /= s.sum(-1, keepdim=True)
    return s @ v


@spelling()
def deferred_normalisation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e @ v / e.sum(-1, keepdim=True)


@spelling()
def deferred_normalisation_minus_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


@spelling()
def deferred_normalisation_by_reciprocal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return torch.matmul(e, v) * e.sum(-1, keepdim=True).reciprocal()


@spelling(0)
def deferred_normalisation_by_ones_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum is taken by the product itself: two products, one softmax."""
    e = scores(q, k).exp()
    return (e @ v) / (e @ torch.ones_like(v[..., :1]))


@spelling()
def log_softmax_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores(q, k), -1).exp() @ v


@spelling()
def log_softmax_method_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(scores(q, k).log_softmax(dim=-1)) @ v


@spelling()
def logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)) @ v


@spelling(0)
def log_of_sum_of_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.exp().sum(-1, keepdim=True).log()).exp() @ v


@spelling(0)
def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp2(scores(q, k) * math.log2(math.e))
    return e / e.sum(-1, keepdim=True) @ v


@spelling()
def softmin_of_negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmin(-scores(q, k), dim=-1) @ v


@spelling()
def transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT / 4).softmax(-2).mT @ v


@spelling()
def transposed_scores_and_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (k @ q.mT / 4).softmax(dim=2)).mT


@spelling()
def transposed_scores_over_their_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The dimension that is summed is not the last one, and does not stay."""
    e = (k @ q.mT / 4).exp()
    return (e / e.sum(-2)[:, :, None]).mT @ v


@spelling()
def transposed_scores_less_their_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = k @ q.mT / 4
    return (s - s.amax(-2).unsqueeze(-2)).softmax(-2).mT @ v


@spelling()
def plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v


@spelling()
def plus_one_minus_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    m = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - m).exp()
    return e / (e.sum(-1, keepdim=True) + (-m).exp()) @ v


@spelling()
def plus_one_minus_detached_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    m = s.detach().amax(-1, keepdim=True).clamp_min(0)
    e = (s - m).exp()
    return e / (e.sum(-1, keepdim=True) + torch.exp(-m)) @ v


@spelling()
def plus_one_minus_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (scores(q, k) - 3).exp()
    return e @ v / (e.sum(-1, keepdim=True) + math.exp(-3))


@spelling(extra=lambda: (rand(2, 3, 9, 20, seed=6),))
def plus_one_minus_the_max_of_another_tensor(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    m = other.amax(-1, keepdim=True)
    e = (scores(q, k) - m).exp()
    return e / (e.sum(-1, keepdim=True) + (-m).exp()) @ v


@spelling(extra=lambda: (rand(3, 1, 1, seed=6), rand(3, 1, 1, seed=7)))
def two_sinks_minus_the_max_of_all(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    s = scores(q, k)
    m = torch.maximum(torch.maximum(s.amax(-1, keepdim=True), a), b)
    e = (s - m).exp()
    return e / (torch.exp(a - m) + e.sum(-1, keepdim=True) + torch.exp(b - m)) @ v


@spelling()
def max_where_it_is_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As what merges blocks writes it: a row without a key subtracts zero."""
    s = scores(q, k).masked_fill(torch.ones(9, 9).tril(-1) == 0, -math.inf)
    m = s.amax(-1, keepdim=True)
    m = torch.where(m == -math.inf, 0.0, m)
    e = (s - m).exp()
    return e / (e.sum(-1, keepdim=True) + (-m).exp()) @ v


@spelling()
def max_subtracted_before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s = (s - s.amax(-1, keepdim=True)) / 2
    e = s.masked_fill(torch.ones(9, 9).tril() == 0, -math.inf).exp()
    return e / e.sum(-1, keepdim=True) @ v


@spelling()
def maximum_subtracted_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    e = (s - m - m).exp()
    return e / (e.sum(-1, keepdim=True) + (-m - m).exp()) @ v


@spelling()
def plus_one_by_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(scores(q, k), (0, 1)).softmax(-1)[..., :-1] @ v


@spelling(1)
def plus_one_by_zero_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.MultiheadAttention's add_zero_attn: a key and a value of zeros."""
    zero = torch.zeros_like(k[:, :, :1])
    return scores(q, torch.cat((k, zero), 2)).softmax(-1) @ torch.cat((v, zero), 2)


def sinks() -> tuple[Tensor]:
    return (rand(3, seed=7),)


@spelling(extra=sinks)
def sink_per_head(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """GPT-OSS."""
    logits = torch.cat((scores(q, k), sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)), dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1] @ v


@spelling(extra=sinks)
def sink_in_front(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    logits = torch.cat((sink.view(1, 3, 1, 1).expand(2, 3, 9, 1), scores(q, k)), -1)
    return logits.softmax(-1)[..., 1:] @ v


@spelling(extra=sinks)
def sink_by_denominator(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + sink.exp()[:, None, None]) @ v


@spelling(1, extra=sinks)
def sink_by_logsumexp_gate(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """The sink as a gate behind an ordinary softmax."""
    s = scores(q, k)
    gate = torch.sigmoid(s.logsumexp(-1, keepdim=True) - sink[:, None, None])
    return s.softmax(-1) @ v * gate


@spelling()
def clamped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).clamp(-1, 1).softmax(-1) @ v


@spelling()
def scores_saturated_on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.hardtanh(scores(q, k), -0.2, 0.3).softmax(-1) @ v


@spelling()
def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(scores(q, k) / 5.0) * 5.0).softmax(-1) @ v


@spelling()
def temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores(q, k) / 0.7, -1) @ v


@spelling()
def added_row_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) + q.sum(-1, keepdim=True)).softmax(-1) @ v


@spelling()
def epsilon_in_denominator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-6) @ v


@spelling(0)
def clamped_denominator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=40.0) @ v


@spelling(0)
def normalised_by_f_normalize(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.normalize(scores(q, k).exp(), p=1, dim=-1) @ v


@spelling()
def plus_one_after_the_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A known slip: one is added after the largest score was taken off, so it weighs differently in each row."""
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v
