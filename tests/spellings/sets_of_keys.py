"""Several sets of keys under one softmax: scores that are joined before it, values that are joined or weights that are not."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spellings import rand, spelling


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


def another(n: int = 5) -> tuple[Tensor, Tensor]:
    """Keys and values of a second set."""
    return rand(2, 3, n, 16, seed=5), rand(2, 3, n, 16, seed=6)


@spelling(extra=another)
def values_joined(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1) @ torch.cat((v, v2), -2)


@spelling(extra=another)
def weights_split(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    a, b = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1).split((9, 5), -1)
    return a @ v + b @ v2


@spelling(extra=another)
def weights_sliced_the_other_way_round(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    out = p[..., 9:] @ v2
    out += p[..., :9] @ v
    return out


@spelling(extra=another)
def causal_among_the_first(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """A memory that all see."""
    own = scores(q, k).masked_fill(torch.ones(9, 9).tril() == 0, -math.inf)
    return torch.cat((own, scores(q, k2)), -1).softmax(-1) @ torch.cat((v, v2), -2)


@spelling(extra=another)
def masked_when_they_are_joined(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    s = torch.cat((scores(q, k2), scores(q, k)), -1)
    seen = F.pad(torch.ones(9, 9).tril(), (5, 0), value=1) == 1
    return torch.where(seen, s, torch.finfo(s.dtype).min).softmax(-1) @ torch.cat((v2, v), -2)


@spelling(extra=lambda: (*another(), rand(3, 1, 1, seed=7), rand(3, 9, 9, seed=8)))
def a_scale_and_a_bias_of_its_own(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    s = torch.cat((scores(q, k) + bias, (q @ k2.mT * scale).tanh()), -1)
    return s.softmax(-1) @ torch.cat((v, v2), -2)


@spelling(extra=lambda: (*another(), *another(1)))
def three_sets(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, k3: Tensor, v3: Tensor) -> Tensor:
    a, b, c = torch.cat((scores(q, k), scores(q, k2), q @ k3.mT), -1).softmax(-1).split((9, 5, 1), -1)
    return a @ v + b @ v2 + c @ v3


@spelling(extra=another)
def weights_of_one_set_scaled(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    return p[..., :9] @ v + (p[..., 9:] * 0.5) @ v2


@spelling(extra=lambda: (rand(5, 16, seed=5), rand(5, 16, seed=6)))
def a_memory_that_all_heads_share(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1) @ torch.cat((v, v2.expand(2, 3, 5, 16)), -2)


@spelling(extra=lambda: (rand(2, 1, 5, 16, seed=5), rand(2, 1, 5, 16, seed=6)))
def grouped_keys_behind(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    k2, v2 = (x.repeat_interleave(3, 1) for x in (k2, v2))
    p = torch.cat((scores(q, k2), scores(q, k)), -1).softmax(-1)
    return p[..., :5] @ v2 + p[..., 5:] @ v


@spelling(extra=another)
def transposed(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    s = torch.cat((k @ q.mT, k2 @ q.mT), -2) / 4
    return s.softmax(-2).mT @ torch.cat((v, v2), -2)


@spelling(extra=lambda: (rand(3, 1, 16, seed=5), rand(3, 1, 16, seed=6)))
def a_key_that_stands_for_none(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    none = torch.einsum("bhqd,hkd->bhqk", q, k2) / 4
    return torch.cat((none, scores(q, k)), -1).softmax(-1) @ torch.cat((v2.expand(2, 3, 1, 16), v), -2)


@spelling(shape=(9, 16), extra=lambda: (rand(5, 16, seed=5), rand(5, 16, seed=6)))
def without_batch(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1) @ torch.cat((v, v2))


@spelling(extra=lambda: (*another(), rand(3, 1, 1, seed=7)))
def with_a_sink(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, sink: Tensor) -> Tensor:
    s = torch.cat((scores(q, k), scores(q, k2), sink.expand(2, 3, 9, 1)), -1)
    p = (s - s.amax(-1, keepdim=True)).softmax(-1)
    return p[..., :14] @ torch.cat((v, v2), -2)


@spelling(extra=another)
def the_first_keys_of_a_tensor(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    s = torch.cat((scores(q, k[:, :, :7]), scores(q, k2)), -1)
    return s.softmax(-1) @ torch.cat((v[:, :, :7], v2), -2)


@spelling(extra=another)
def the_last_keys_of_a_tensor(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    s = torch.cat((scores(q, k2), scores(q, k[:, :, 2:])), -1)
    return s.softmax(-1) @ torch.cat((v2, v[:, :, 2:]), -2)


@spelling(extra=another)
def by_exponentials(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    e = torch.cat((scores(q, k), scores(q, k2)), -1).exp()
    return e / e.sum(-1, keepdim=True) @ torch.cat((v, v2), -2)


@spelling(dtype=torch.bfloat16, extra=lambda: tuple(x.bfloat16() for x in another()))
def in_bfloat16(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.cat((scores(q, k), scores(q, k2)), -1).float().softmax(-1).type_as(v) @ torch.cat((v, v2), -2)


@spelling(2, extra=another)
def the_same_weights_twice(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """Two products, but one set."""
    p = scores(q, k).softmax(-1)
    return p @ v + p @ v.flip(-1)


# ---------------------------------------------------------------------------------------------------- what is left alone


@spelling(0, reason="ScoresJoined", extra=another)
def each_with_a_query_of_its_own(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.cat((scores(q, k), scores(q.flip(-1), k2)), -1).softmax(-1) @ torch.cat((v, v2), -2)


@spelling(0, reason="ScoresJoined", extra=another)
def one_with_half_of_the_features(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    s = torch.cat((q[..., :8] @ k[..., :8].mT, scores(q, k2)), -1)
    return s.softmax(-1) @ torch.cat((v, v2), -2)


@spelling(0, reason="WrongDimension", extra=another)
def only_one_set_has_values(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.cat((scores(q, k), scores(q, k2.repeat(1, 1, 2, 1))), -1).softmax(-1)[..., :9] @ v


@spelling(extra=another)
def weights_of_one_set_returned(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    return p @ torch.cat((v, v2), -2), p[..., 9:]


@spelling(extra=another)
def scores_of_one_set_decide_on_the_other(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    a, b = scores(q, k), scores(q, k2)
    s = torch.cat((a, b * a.amax(-1, keepdim=True)), -1)
    return s.softmax(-1) @ torch.cat((v, v2), -2)
