"""Regions around and across an attention: autocast, grad modes, checkpoints, mutation, control flow."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spellings import qkv, rand, spelling


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------ autocast


@spelling()
def autocast_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attend(q, k, v)


@spelling()
def autocast_off_for_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2's reorder_and_upcast_attn: the scores in float32, the rest in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            s = q.float() @ k.float().mT / 4
        return s.softmax(-1).to(v.dtype) @ v


@spelling()
def autocast_around_the_scores_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = q @ k.mT
    return (s.float() / 4).softmax(-1).to(v.dtype) @ v


@spelling(extra=lambda: (rand(2, 1, 9, 9, seed=5),))
def autocast_inplace_addition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """bfloat16 += float32 stays bfloat16, out of place it would not."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = q @ k.mT
        s += bias
        return s.softmax(-1) @ v


@spelling()
def autocast_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# ---------------------------------------------------------------------------------------------------------- checkpoint


@spelling()
def checkpoint_not_reentrant(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return checkpoint(attend, q, k, v, use_reentrant=False)


@spelling()
def checkpoint_reentrant(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return checkpoint(attend, q, k, v, use_reentrant=True)


@spelling(2)
def checkpoint_and_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(attend, q, k, v, use_reentrant=False), k, v)


def training() -> tuple[Tensor, ...]:
    return tuple(x.requires_grad_() for x in qkv())


@spelling(inputs=training, grad=True)
def gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=training, grad=True)
def gradients_through_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return checkpoint(attend, q, k, v, use_reentrant=False)


@spelling(grad=True)
def gradients_enabled_but_not_needed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=training, grad=True)
def no_grad_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return attend(q, k, v)


@spelling(inputs=training, grad=True)
def softmax_under_no_grad_values_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        p = (q @ k.mT / 4).softmax(-1)
    return p @ v


@spelling(0, inputs=training, grad=True)
def detached_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unlike that of a maximum, its gradient is not zero."""
    s = q @ k.mT / 4
    return (s - s.logsumexp(-1, keepdim=True).detach()).exp() @ v


@spelling(0, inputs=training, grad=True)
def detached_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).detach().softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ mutation and aliasing


@spelling(1)
def query_mutated_after_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 4
    q.mul_(0)
    return s.softmax(-1) @ v


@spelling(1)
def query_mutated_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = (q @ k.mT / 4).softmax(-1)
    q.zero_()
    return p @ v, q.clone()


@spelling(1)
def value_mutated_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT / 4).softmax(-1)
    v += 1
    return p @ v


@spelling(1)
def value_mutated_that_was_the_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ v.mT / 4).softmax(-1)
    v += 1
    return p @ v


@spelling(1)
def key_mutated_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 4
    k[:, :, 0].fill_(7.0)
    return s.softmax(-1) @ v


@spelling(1, extra=lambda: (torch.zeros(2, 1, 9, 9),))
def mask_mutated_after_use(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = q @ k.mT / 4 + mask
    mask.fill_(3.0)
    return s.softmax(-1) @ v


@spelling(0, reason="Mutated", extra=lambda: (rand(9, 9, seed=5),))
def bias_written_between_two_reads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.mT / 4 + bias
    bias.mul_(2)
    return (s + bias).softmax(-1) @ v


@spelling()
def query_written_by_halves_and_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is attended with is a view that is taken after the writes."""
    q = q.transpose(1, 2)
    turned = torch.empty_like(q)
    turned[..., 0::2] = q[..., 0::2] * 2 - q[..., 1::2]
    turned[..., 1::2] = q[..., 1::2] * 2 + q[..., 0::2]
    return F.scaled_dot_product_attention(turned.type_as(q).permute(0, 2, 1, 3), k, v)


@spelling(extra=lambda: (torch.ones(11, 11).tril(-1).long(),))
def mask_written_before_a_part_of_it_is_read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What is written is computed from what was there."""
    mask.mul_(-1).add_(1)
    return (q @ k.mT / 4).masked_fill(mask[:9, :9] == 0, float("-inf")).softmax(-1) @ v


@spelling(inputs=lambda: (*training(), rand(2, 1, 9, 9, seed=5)), grad=True)
def bias_written_after_use_in_training(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The derivative of a sum does not read it; one that computes the scores again does."""
    out = (q @ k.mT / 4 + bias).softmax(-1) @ v
    bias.fill_(3.0)
    return out


@spelling(extra=lambda: (4 * rand(17, 3, seed=5),))
def table_renormalised_by_its_lookup(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """max_norm= writes to the table."""
    i = torch.arange(9)
    bias = F.embedding(i - i[:, None] + 8, table, max_norm=1.0)
    return (q @ k.mT / 4 + bias.permute(2, 0, 1)).softmax(-1) @ v


@spelling(extra=lambda: (4 * rand(17, 3, seed=5),))
def table_renormalised_by_an_argument_without_its_name(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i = torch.arange(9)
    bias = F.embedding(i - i[:, None] + 8, table, None, 1.0)
    return (q @ k.mT / 4 + bias.permute(2, 0, 1)).softmax(-1) @ v


@spelling()
def inputs_mutated_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    q.add_(1)
    return out


@spelling()
def inputs_mutated_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q.mul_(0.5)
    return attend(q, k, v)


@spelling()
def output_mutated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    out += 1
    return out


@spelling()
def output_mutated_and_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    out += 1
    return out * 2


@spelling(0, reason="NotTraceable")
def output_written_into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    torch.matmul((q @ k.mT).softmax(-1), v, out=out)
    return out


@spelling(1)
def scores_written_over_a_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s[..., 0] = 0.5
    return s.softmax(-1) @ v


@spelling(1)
def scores_written_by_an_inplace_argument(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    F.relu(s, inplace=True)
    return s.softmax(-1) @ v


@spelling(0)
def scores_filled_diagonally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    return s.softmax(-1) @ v


@spelling(1)
def probabilities_mutated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1)
    p *= 0.5
    return p @ v


# --------------------------------------------------------------------------------------- what leaves, what comes between


@spelling(1)
def probabilities_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = (q @ k.mT / 4).softmax(-1)
    return p @ v, p


@spelling(0, reason="ProbabilitiesUsed")
def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    s = q @ k.mT / 4
    return s.softmax(-1) @ v, s


@spelling(2)
def probabilities_used_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    p = (q @ k.mT / 4).softmax(-1)
    return p @ v, p @ q


@spelling(0)
def graph_break_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT / 4).softmax(-1)
    torch._dynamo.graph_break()
    return p @ v


@spelling(random=True)
def dropout_active(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT / 4).softmax(-1), 0.3, training=True) @ v


@spelling()
def dropout_not_in_training(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT / 4).softmax(-1), 0.3, training=False) @ v


@spelling()
def dropout_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT / 4).softmax(-1), 0.0, training=True) @ v


@spelling(2)
def two_in_a_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(attend(q, k, v), k, v)


@spelling(2)
def one_product_of_scores_two_softmaxes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Differential attention computes two maps; here they share the scores."""
    s = q @ k.mT
    return (s / 4).softmax(-1) @ v - 0.5 * ((s / 2).softmax(-1) @ v)


@spelling(2)
def difference_of_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT / 4).softmax(-1) - 0.5 * (k @ q.mT / 4).softmax(-1)) @ v


@spelling()
def contiguous_and_copies_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q.contiguous() @ k.transpose(-1, -2).contiguous()).clone() / 4
    return s.softmax(-1).contiguous() @ v.clone()


@spelling()
def scores_reshaped_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT / 4).view(6, 9, 9)
    return s.softmax(-1).view(2, 3, 9, 9) @ v


@spelling()
def nan_to_num_on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).nan_to_num().softmax(-1) @ v


@spelling(0, reason="WeightNotLinear")
def nan_to_num_on_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT / 4).masked_fill(torch.arange(9)[:, None] == 4, -torch.inf)
    return s.softmax(-1).nan_to_num(0.0) @ v


@spelling(1)
def probabilities_masked_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ESM and others zero what was masked once more."""
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    return (q @ k.mT / 4).masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0.0) @ v


@spelling(1)
def under_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(attend)(q, k, v)


@spelling(1)
def in_a_branch(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.cond(q.sum() > 0, attend, lambda q, k, v: q + k + v, (q, k, v))
