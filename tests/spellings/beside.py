"""What is read beside the result: the log-sum-exp of rows, and weights, whole, averaged or put to any use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spellings import named, qkv, rand, spelling, trained


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


def causal(s: Tensor, fill: float = float("-inf")) -> Tensor:
    q, k = (torch.arange(n) for n in s.shape[-2:])
    return s.masked_fill(k > q[:, None], fill)


# ------------------------------------------------------------------------------------------------------ log-sum-exp


@spelling()
def logsumexp_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = causal(scores(q, k))
    return s.softmax(-1) @ v, s.logsumexp(-1)


@spelling()
def logsumexp_kept_before_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    lse = torch.logsumexp(s, -1, keepdim=True)
    return (s - lse).exp() @ v, lse


@spelling()
def logsumexp_used_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    share = torch.sigmoid(s.logsumexp(-1, keepdim=True))
    return s.softmax(-1) @ v[..., :8] * share


@spelling()
def logsumexp_by_hand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = causal(scores(q, k))
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    return (e @ v) / total, (m + total.log()).squeeze(-1)


@spelling(extra=lambda: (torch.arange(9) % 4 > 0,))
def logsumexp_by_hand_of_rows_without_a_score(q: Tensor, k: Tensor, v: Tensor, there: Tensor) -> tuple[Tensor, ...]:
    """Infinity less infinity is no number; the operator's is minus infinity."""
    s = scores(q, k).masked_fill(~there[:, None], float("-inf"))
    m = s.amax(-1, keepdim=True)
    total = torch.exp(s - m).sum(-1, keepdim=True)
    return s.softmax(-1) @ v, total.log() + m, s.logsumexp(-1)


@spelling()
def logsumexp_without_a_maximum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    e = scores(q, k).exp()
    total = e.sum(-1, keepdim=True)
    return e / total @ v, total.log()


@spelling()
def logsumexp_with_a_detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    m = s.amax(-1, keepdim=True).detach()
    return s.softmax(-1) @ v, (s - m).exp().sum(-1, keepdim=True).log() + m


@spelling(0, reason="ProbabilitiesUsed", inputs=lambda: trained(qkv()), grad=True)
def logsumexp_to_which_another_maximum_is_added(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Its gradient is one more at the largest score of each row."""
    s = scores(q, k)
    m = s.amax(-1, keepdim=True)
    return s.softmax(-1) @ v, (s - m.detach()).exp().sum(-1, keepdim=True).log() + m


@spelling(extra=lambda: (rand(3, 1, 1, seed=5),))
def logsumexp_with_its_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
    s = torch.cat([scores(q, k), sink.expand(2, 3, 9, 1)], -1)
    return s.softmax(-1)[..., :-1] @ v, s.logsumexp(-1)


@spelling(0, reason="ProbabilitiesUsed", extra=lambda: (rand(3, 1, 1, seed=5),))
def logsumexp_without_its_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    return torch.cat([s, sink.expand(2, 3, 9, 1)], -1).softmax(-1)[..., :-1] @ v, s.logsumexp(-1)


@spelling(0, reason="ProbabilitiesUsed")
def logsumexp_of_other_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    return causal(s).softmax(-1) @ v, s.logsumexp(-1)


@spelling(0, reason="ProbabilitiesUsed")
def logsumexp_over_queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    return s.softmax(-1) @ v, s.logsumexp(-2)


@spelling(shape=(2, 3, 16, 16), kv=16)
def logsumexp_in_another_order(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = torch.einsum("bhqd,bhkd->bqhk", q, k) / 4
    return torch.einsum("bqhk,bhkd->bhqd", s.softmax(-1), v), s.logsumexp(-1)


@spelling(dtype=torch.bfloat16)
def logsumexp_in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    return s.float().softmax(-1).to(v.dtype) @ v, s.float().logsumexp(-1)


@spelling(2)
def parts_merged_by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = scores(q, k[..., :4, :]), scores(q, k[..., 4:, :])
    la, lb = a.logsumexp(-1, keepdim=True), b.logsumexp(-1, keepdim=True)
    both = torch.logaddexp(la, lb)
    return a.softmax(-1) @ v[..., :4, :] * (la - both).exp() + b.softmax(-1) @ v[..., 4:, :] * (lb - both).exp()


# ---------------------------------------------------------------------------------------------------------- weights


@spelling()
def weights_under_a_causal_mask(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = causal(scores(q, k)).softmax(-1)
    return p @ v, p


@spelling(extra=lambda: (torch.arange(9) % 4 > 0,))
def weights_of_masked_rows(q: Tensor, k: Tensor, v: Tensor, there: Tensor) -> tuple[Tensor, ...]:
    """Every fourth row is masked entirely, by a number: its weights are all alike."""
    p = causal(scores(q, k), torch.finfo(q.dtype).min).masked_fill(~there[:, None], torch.finfo(q.dtype).min).softmax(-1)
    return p @ v, p


@spelling(extra=lambda: (torch.arange(9) % 4 > 0,))
def weights_of_rows_without_a_score(q: Tensor, k: Tensor, v: Tensor, there: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k).masked_fill(~there[:, None], float("-inf"))
    p = s.softmax(-1)
    return p @ v, p


@spelling()
def weights_and_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = scores(q, k)
    p = s.softmax(-1)
    return p @ v, p, s.logsumexp(-1)


@spelling()
def weights_used_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    return p @ v, entropy


@spelling()
def weights_averaged_over_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = causal(scores(q, k)).softmax(-1)
    return p @ v, p.mean(1)


@spelling()
def weights_averaged_over_heads_that_are_kept(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).softmax(-1)
    return p @ v, p.mean(dim=-3, keepdim=True)


@spelling()
def weights_averaged_over_the_batch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Of those indices neighbours are no mean: the weights are written, and the graph averages them."""
    p = scores(q, k).softmax(-1)
    return p @ v, p.mean(0)


@spelling()
def weights_of_the_first_query(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).softmax(-1)
    return p @ v, p[..., 0, :]


@spelling()
def weights_of_each_key(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """How much attention each key receives."""
    p = scores(q, k).softmax(-1)
    return p @ v, p.sum(-2)


@spelling(extra=lambda: (rand(3, 1, 1, seed=5),))
def weights_with_a_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
    p = torch.cat([scores(q, k), sink.expand(2, 3, 9, 1)], -1).softmax(-1)[..., :-1]
    return p @ v, p + 0


@spelling(extra=lambda: (rand(3, 1, 1, seed=5),))
def weights_before_and_after_a_gate(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).softmax(-1)
    gated = p * gate
    return gated @ v, p, gated


@spelling(dtype=torch.bfloat16)
def weights_in_two_dtypes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).float().softmax(-1)
    return p.to(v.dtype) @ v, p, p.to(v.dtype)


@spelling(2, inputs=lambda: (*qkv(), rand(2, 3, 9, 8, seed=4)))
def weights_of_two_products(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).softmax(-1)
    return p @ v, p @ other, p.mean(1)


@spelling(shape=(2, 1, 9, 16))
def weights_of_one_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).softmax(-1)
    return p @ v, p


@spelling(random=True)
def weights_that_are_dropped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = F.dropout(scores(q, k).softmax(-1), 0.5)
    return p @ v, p


@spelling()
def weights_averaged_of_a_view(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """As nn.MultiheadAttention has them."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    p = torch.baddbmm(torch.zeros(9, 9, dtype=q.dtype), q, k.mT, alpha=0.25).softmax(-1)
    return p @ v, p.view(2, 3, 9, 9).mean(1)


def by_distance(x: Tensor) -> Tensor:
    """The entry of query q and key k in the column 8 + k - q: zeros beside each row, read in rows that are longer by one."""
    rows = F.pad(x, (0, 8)).flatten(-2)
    return F.pad(rows, (9, 0)).view(2, 3, 9, 18)[..., 1:]


def by_key(x: Tensor) -> Tensor:
    """The other way."""
    rows = F.pad(F.pad(x, (0, 1)).flatten(-2), (0, 8))
    return rows.view(2, 3, 10, 17)[..., :9, 8:]


def _added(out: Tensor, more: Tensor) -> Tensor:
    return out + more


def _added_in_place(out: Tensor, more: Tensor) -> Tensor:
    out += more
    return out


def _added_to_what_is_returned(out: Tensor, more: Tensor) -> Tensor:
    out.add_(more)
    return out


def _added_to_what_is_scaled(out: Tensor, more: Tensor) -> Tensor:
    out.add_(more)
    return out * 2


def _added_below_a_view(out: Tensor, more: Tensor) -> Tensor:
    view = out.flatten(-2)
    out += more
    return view


def _added_after_a_reader(out: Tensor, more: Tensor) -> Tensor:
    before = out * 2
    out += more
    return out + before


for _sum in (
    _added, _added_in_place, _added_to_what_is_returned, _added_to_what_is_scaled, _added_below_a_view, _added_after_a_reader,
):  # fmt: skip

    def _program(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, add=_sum) -> Tensor:  # type: ignore[no-untyped-def]
        """VITS: keys and values of each distance, beside those of each position."""
        p = (scores(q, k) + by_key(q @ keys.mT)).softmax(-1)
        return add(p @ v, by_distance(p) @ values)  # type: ignore[no-any-return]

    spelling(extra=lambda: (rand(17, 16, seed=3), rand(17, 16, seed=4)))(
        named(_program, f"weights_read_again_by_distance{_sum.__name__}")
    )


@spelling(0, reason="ProbabilitiesUsed")
def weights_written_to(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = scores(q, k).softmax(-1)
    out = p @ v
    return out, p.mul_(2)


@spelling(0, reason="ProbabilitiesUsed")
def exponentials_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    e = scores(q, k).exp()
    return e @ v / e.sum(-1, keepdim=True), e


for _name, _read in {
    "largest": lambda p: p.amax(-1), "places": lambda p: p.argmax(-1), "loss": lambda p: (p * p).mean(),
    "no_gradient": lambda p: p.detach().sum(-2), "transposed": lambda p: p.mT @ p,
}.items():  # fmt: skip

    def _program(q: Tensor, k: Tensor, v: Tensor, read=_read) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        p = causal(scores(q, k)).softmax(-1)
        return p @ v, read(p)

    spelling()(named(_program, f"weights_read_for_{_name}"))


@spelling(0, extra=lambda: (rand(3, 1, 1, seed=7),), reason="ProbabilitiesUsed")
def share_of_a_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """What no value belongs to is no weight of a key."""
    p = torch.cat([scores(q, k), sink.expand(*q.shape[:-1], 1)], -1).softmax(-1)
    return p[..., :-1] @ v, p[..., -1]
