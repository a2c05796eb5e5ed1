"""What looks like attention and is another function: fused or declined, the result is eager's."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spellings import qkv, rand, spelling, trained


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


# ----------------------------------------------------------------------------------------------------- the normalisation


@spelling(0, reason="WrongDimension")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-2) @ v


@spelling(0, reason="WrongDimension")
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(1) @ v


@spelling(0, reason="WrongDimension")
def softmax_over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(0) @ v


@spelling(0, reason="WrongDimension")
def softmax_over_queries_and_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).flatten(2).softmax(-1).view(2, 3, 9, 9) @ v


@spelling(0)
def softmax_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1).softmax(-1) @ v


@spelling(0)
def sum_over_another_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / e.sum(-2, keepdim=True) @ v


@spelling(0)
def sum_broadcast_the_wrong_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without keepdim the sums of the rows divide the columns."""
    e = scores(q, k).exp()
    return e / e.sum(-1)[:, :, None] @ v


@spelling(0, reason="ScoresUsed")
def values_made_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.softmax(-1) @ (s.sin() @ v)


@spelling()
def max_of_another_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


@spelling(0)
def sum_of_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).exp() / scores(k, q).exp().sum(-1, keepdim=True) @ v


@spelling(1)
def sum_before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e.tril() / e.sum(-1, keepdim=True) @ v


@spelling(0, reason="WrongDimension")
def sum_over_more_keys_than_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e[..., :5] / e.sum(-1, keepdim=True) @ v[:, :, :5]


@spelling(extra=lambda: (rand(9, 1, seed=5),))
def denominator_with_exp_of_another_number(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """exp(-max) beside the sum is a logit of zero; exp(-x) of any other x is none."""
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / (e.sum(-1, keepdim=True) + (-x).exp()) @ v


@spelling(extra=lambda: (rand(9, 1, seed=5),))
def denominator_with_exp_less_another_number(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / (e.sum(-1, keepdim=True) + (0.5 - x).exp()) @ v


@spelling()
def maximum_subtracted_twice_from_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    e = (s - m - m).exp()
    return e / (e.sum(-1, keepdim=True) + (-m).exp()) @ v


@spelling()
def rows_hidden_by_their_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Added to a whole row, but a mask: such a row is NaN."""
    s = scores(q, k)
    return (s + torch.where(s.amax(-1, keepdim=True) > 0.8, 0.0, -math.inf)).softmax(-1) @ v


@spelling()
def mean_of_masked_scores_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Minus infinity in every row with a hidden key, which is NaN for that."""
    s = scores(q, k).masked_fill(torch.ones(9, 9).tril() == 0, -math.inf)
    return (s - s.mean(-1, keepdim=True)).softmax(-1) @ v


@spelling()
def rows_hidden_by_what_is_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Minus 1e9, beside which scores are rounded away, is an average of all values."""
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    return (s - torch.where(m > 0.8, m, 1e9)).softmax(-1) @ v


@spelling(inputs=lambda: trained(qkv()), grad=True)
def maximum_detached_in_one_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same numbers, but not the same gradients: that of the maximum that is added stays."""
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    e = (s - m.detach()).exp()
    return e / (e.sum(-1, keepdim=True) + (-m).exp()) @ v


@spelling(0)
def denominator_of_each_entry(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + e) @ v


@spelling(0, extra=lambda: (rand(9, 9, seed=5),))
def denominator_of_each_key(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + bias.exp()) @ v


@spelling(0, extra=lambda: (rand(16, seed=5),))
def late_denominator_of_each_feature(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return e @ v / (e.sum(-1, keepdim=True) + logit.exp())


@spelling(1, extra=lambda: (rand(16, seed=5),))
def sink_gate_of_each_feature(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Tensor:
    """An attention and a gate, which is made of its log-sum-exp."""
    s = scores(q, k)
    return s.softmax(-1) @ v * torch.sigmoid(s.logsumexp(-1, keepdim=True) - logit)


@spelling(0, reason="ProbabilitiesUsed", extra=lambda: (rand(3, 1, 1, seed=5),))
def sink_gate_after_another_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    s = scores(q, k)
    gate = torch.sigmoid(s.logsumexp(-1, keepdim=True) - sink)
    return F.pad(s, (0, 1)).softmax(-1)[..., :-1] @ v * gate


@spelling(extra=lambda: (rand(9, seed=5),))
def max_subtracted_before_a_factor_of_each_key(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    s = scores(q, k)
    return ((s - s.amax(-1, keepdim=True)) * factor).softmax(-1) @ v


@spelling(extra=lambda: (rand(9, seed=5),))
def max_subtracted_behind_a_factor_of_each_key(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    s = scores(q, k)
    return (factor * (s - s.amax(-1, keepdim=True))).softmax(-1) @ v


@spelling(0)
def base_other_than_e(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp2(scores(q, k))
    return e / e.sum(-1, keepdim=True) @ v


@spelling(0)
def base_ten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = 10 ** scores(q, k)
    return e / e.sum(-1, keepdim=True) @ v


@spelling(0)
def absolute_normalisation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s / s.abs().sum(-1, keepdim=True) @ v


@spelling(0)
def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k).relu().square()
    return s / (s.sum(-1, keepdim=True) + 1e-6) @ v


@spelling(0)
def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).sigmoid() @ v


@spelling(0)
def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


@spelling(0)
def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax on query and key apart."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@spelling(0)
def log_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).log_softmax(-1) @ v


@spelling(0, reason="ScoresUsed")
def top_k_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    least = s.topk(3, dim=-1).values[..., -1:]
    return s.masked_fill(s < least, -math.inf).softmax(-1) @ v


@spelling(0, reason="WeightNotLinear")
def scores_masked_by_themselves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.masked_fill(s < 0, -math.inf).softmax(-1).nan_to_num() @ v


@spelling(0)
def gumbel_noise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.gumbel_softmax(scores(q, k), dim=-1) @ v


@spelling(0, reason="HeadsMixed")
def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads are mixed before the softmax."""
    mix = torch.eye(3, dtype=q.dtype).roll(1, 0) + 0.1
    return torch.einsum("bhqk,hg->bgqk", scores(q, k), mix).softmax(-1) @ v


@spelling(0, reason="HeadsMixed")
def heads_mixed_on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As talking heads are defined."""
    mix = torch.eye(3, dtype=q.dtype).roll(1, 0) + 0.1
    s = torch.einsum("bhqk,hg->bgqk", scores(q, k), mix)
    return torch.einsum("bhqk,hg->bgqk", s.softmax(-1), mix) @ v


@spelling(0, inputs=lambda: (*qkv(), nn.Linear(3, 3), nn.Linear(3, 3)))
def heads_mixed_by_layers(q: Tensor, k: Tensor, v: Tensor, before: nn.Module, behind: nn.Module) -> Tensor:
    """CaiT; a layer is not looked into."""
    s = before(scores(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return behind(s.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


@spelling(0, reason="HeadsMixed")
def heads_mixed_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.eye(3, dtype=q.dtype).roll(1, 0) + 0.1
    return torch.einsum("bhqk,hg->bgqk", scores(q, k).softmax(-1), mix) @ v


@spelling()
def standardised_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return ((s - s.mean(-1, keepdim=True)) / s.std(-1, keepdim=True)).softmax(-1) @ v


@spelling()
def sink_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat((s, s.mean(-1, keepdim=True)), -1).softmax(-1)[..., :-1] @ v


@spelling(0)
def sink_not_removed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat((scores(q, k), torch.zeros(2, 3, 9, 1)), -1)
    return s.softmax(-1)[..., 1:] @ v


@spelling(0, reason="WrongDimension")
def probabilities_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1).roll(1, -1) @ v


@spelling(0, reason="WrongDimension")
def probabilities_reversed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1).flip(-1) @ v


@spelling(0, reason="WeightNotLinear")
def probabilities_cut_to_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    return (p * 3).long().to(q.dtype) @ v


@spelling(0, reason="WeightNotLinear")
def probabilities_sharpened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1) ** 2
    return p @ v


@spelling(0, reason="WrongDimension")
def probabilities_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1).mT @ v


@spelling()
def probabilities_plus_identity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) + torch.eye(9)) @ v


@spelling(0, reason="WeightNotLinear")
def probabilities_thresholded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    return torch.where(p > 0.1, p, 0.0) @ v


# ------------------------------------------------------------------------------------------------- softmax elsewhere


@spelling(0, inputs=lambda: (rand(4, 16), rand(16, 10, seed=1)))
def classifier(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).softmax(-1)


@spelling(0, inputs=lambda: (rand(6, 16), rand(16, 4, seed=1), rand(4, 16, 20, seed=2)))
def router(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    weight, chosen = (x @ gate).softmax(-1).topk(2)
    return torch.einsum("nc,nd,ncde->ne", weight, x, experts[chosen])


@spelling(0, reason="UnsupportedShape", inputs=lambda: (rand(6, 16), rand(16, 4, seed=1), rand(4, 16, 20, seed=2)))
def soft_mixture_of_experts(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    return torch.einsum("ne,neo->no", (x @ gate).softmax(-1), torch.einsum("nd,edo->neo", x, experts))


@spelling(0, inputs=lambda: (nn.Linear(16, 9), rand(6, 16), rand(9, 20, seed=2)))
def distribution_over_prototypes(layer: nn.Module, x: Tensor, prototypes: Tensor) -> Any:
    """A linear layer and a product: attention to parameters, or a classifier's expected value."""
    return layer(x).softmax(-1) @ prototypes


@spelling(0, inputs=lambda: (rand(6, 9),))
def softmax_alone(x: Tensor) -> Tensor:
    return x.softmax(-1)


@spelling(0, inputs=lambda: (rand(2, 9, 16), nn.Conv1d(9, 5, 1)))
def softmax_into_convolution(x: Tensor, convolution: nn.Module) -> Any:
    return convolution((x @ x.mT).softmax(-1))


@spelling(0, inputs=lambda: (rand(6, 10), torch.arange(6)))
def cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ x.mT @ x, target)


@spelling(0)
def products_without_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ k.mT @ v


@spelling(0, reason="UnsupportedShape", shape=(2, 3, 0, 16))
def no_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


@spelling(0, reason="UnsupportedShape", shape=(0, 3, 9, 16))
def no_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


@spelling(0, reason="UnsupportedShape", kv=0)
def no_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


@spelling(0, reason="UnsupportedShape", inputs=lambda: (rand(2, 3, 9, 0), rand(2, 3, 9, 0), rand(2, 3, 9, 16)))
def no_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


@spelling(1)
def infinite_and_nan_inputs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q[0, 0, 0, 0], k[0, 1, 2, 3], v[1, 0, 0, 0] = math.inf, math.nan, math.inf
    return scores(q, k).softmax(-1) @ v


@spelling(1)
def large_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp alone would overflow."""
    return (q @ k.mT * 100).softmax(-1) @ v


@spelling(1)
def large_scores_without_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp overflows, and eager gives NaN where a kernel need not."""
    e = (q @ k.mT * 20).exp()
    return e / e.sum(-1, keepdim=True) @ v


@spelling(1, dtype=torch.float16)
def float16_scores_that_overflow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 300) @ (k * 300).mT / 90000).softmax(-1) @ v
