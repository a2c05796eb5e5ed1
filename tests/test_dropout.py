"""Dropout behind the softmax: the same distribution as the model's, the same mask in forward and backward, none stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import heads, pass_over
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fuse
from fuse.expr import to_text

RATE, BATCH, HEADS, LENGTH = 0.25, 4, 8, 64
ENTRIES = BATCH * HEADS * LENGTH * LENGTH


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT / 4).softmax(-1), RATE, training=True) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=RATE)


def bernoulli(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT / 4).softmax(-1)
    return p * torch.bernoulli(torch.full_like(p, 1 - RATE)) / (1 - RATE) @ v


def comparison(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT / 4).softmax(-1)
    return p * (torch.rand_like(p) > RATE) * (1 / (1 - RATE)) @ v


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT / 4).softmax(-1)
    return (p / (1 - RATE)).masked_fill(torch.rand(p.shape) < RATE, 0.0) @ v


SPELLINGS = (attend, sdpa, bernoulli, comparison, filled)


def compiled(program: Callable[..., Any], inner: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(program, backend="fuse", options={"inner": inner, "target": "reference"})


def kept(program: Callable[..., Any], seed: int = 0, heads: int = HEADS) -> Tensor:
    """Which probabilities were kept, (batch, heads, row, key): scores are equal and values are unit vectors."""
    torch.manual_seed(seed)
    zero = torch.zeros(BATCH, heads, LENGTH, 16)
    weight = program(zero, zero, torch.eye(LENGTH).expand(BATCH, heads, LENGTH, LENGTH)) * LENGTH * (1 - RATE)
    assert ((weight == 0) | ((weight - 1).abs() < 1e-5)).all()
    return weight > 0.5


@pytest.mark.parametrize("program", SPELLINGS)
def test_every_spelling_keeps_the_share_that_it_says(program: Callable[..., Any]) -> None:
    mask = kept(compiled(program))
    assert fuse.report().recovered == 1
    assert abs(float(mask.double().mean()) - (1 - RATE)) < 4 * (RATE * (1 - RATE) / ENTRIES) ** 0.5


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_same_seed_same_mask_next_step_another(inner: str) -> None:
    run = compiled(attend, inner)
    first, again, other = kept(run), kept(run), kept(run, seed=1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    steps = [run(*heads(LENGTH)) for _ in range(2)]
    assert not torch.equal(*steps)


def test_entries_are_independent_over_keys_rows_heads_batches_and_steps() -> None:
    run = compiled(attend)
    centred = [(kept(run, seed).double() - (1 - RATE)) / (RATE * (1 - RATE)) ** 0.5 for seed in (0, 1)]
    shifts = [(1, 0), (1, 1), (1, 2), (1, 3), (16, 3), (4, 3)]
    products = [centred[0] * centred[0].roll(by, dim) for by, dim in shifts] + [centred[0] * centred[1]]
    for product in products:
        assert abs(float(product.mean())) < 4 / ENTRIES**0.5


def test_sums_of_rows_and_of_keys_have_the_variance_of_independent_draws() -> None:
    mask = kept(compiled(attend)).double()
    for dim in (2, 3):
        sums = mask.sum(dim)
        expected = LENGTH * RATE * (1 - RATE)
        assert abs(float(sums.var()) / expected - 1) < 4 * (2 / sums.numel()) ** 0.5


def test_layers_of_one_graph_draw_their_own_masks() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack((attend(q, k, v), attend(q, k, v)))

    zero, one = torch.zeros(1, 1, LENGTH, 16), torch.eye(LENGTH)[None, None]
    first, second = compiled(both)(zero, zero, one)
    assert fuse.report().recovered == 2 and not torch.equal(first, second)


def test_the_expectation_is_the_result_without_dropout() -> None:
    q, k, v = heads(LENGTH)
    run, exact = compiled(attend), (q @ k.mT / 4).softmax(-1) @ v
    draws = torch.stack([run(q, k, v) for _ in range(64)])
    error = (draws.mean(0) - exact) / (draws.std(0) / 8)
    assert error.abs().mean() < 1 and error.abs().amax() < 6


def with_checkpoint(use_reentrant: bool) -> Callable[..., Any]:
    return lambda q, k, v: checkpoint(attend, q, k, v, use_reentrant=use_reentrant)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "program", [attend, sdpa, with_checkpoint(False), with_checkpoint(True)], ids=["dropout", "sdpa", "checkpoint", "reentrant"]
)
def test_backward_uses_the_mask_of_forward(program: Callable[..., Any], inner: str) -> None:
    """The result is linear in the values and their gradient is its transpose: <out, g> = <v, dv> for the same mask alone."""
    q, k, v = (x.requires_grad_() for x in heads(LENGTH))
    g, run = torch.randn_like(q), compiled(program, inner)
    out = run(q, k, v)
    out.backward(g)
    assert v.grad is not None and fuse.report().recovered == 1
    assert float((out * g).sum()) == pytest.approx(float((v * v.grad).sum()), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("program", [attend, with_checkpoint(False)], ids=["dropout", "checkpoint"])
def test_gradients_with_dropout_are_slopes(program: Callable[..., Any]) -> None:
    q, k, v = (x.double().requires_grad_() for x in heads(21))
    run, g, way = compiled(program), torch.randn(q.shape, dtype=torch.float64), torch.randn(q.shape, dtype=torch.float64)

    def along(h: float) -> Tensor:
        torch.manual_seed(3)
        loss: Tensor = (run(q + h * way, k, v) * g).sum()
        return loss

    loss = along(0.0)
    loss.backward()
    assert q.grad is not None
    slope = float((q.grad * way).sum())
    assert float(along(1e-5) - along(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_multihead_attention_in_training_is_fused_with_its_dropout() -> None:
    attention = nn.MultiheadAttention(48, 3, dropout=RATE, batch_first=True)
    x = torch.randn(2, 9, 48)
    for need_weights in (False, True):
        torch._dynamo.reset()
        fuse.reset()
        compiled(lambda x, n=need_weights: attention(x, x, x, need_weights=n)[0])(x).sum().backward()
        (site,) = fuse.report().sites
        assert site.recovered and "uniform" in str(site.spec and site.spec.weight)


def test_no_mask_is_stored_and_the_rate_is_read() -> None:
    spec = pass_over(attend, *heads()).spec
    assert [(o.rank, o.dtype) for o in spec.operands].count((1, "int64")) == 1 and len(spec.operands) == 4
    assert "< 0.75, 1.33333, 0)" in to_text(spec.weight)


def test_numbers_that_are_read_elsewhere_stay_what_they_are() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.rand(9, 9) > RATE
        return (q @ k.mT).softmax(-1) * mask @ v, mask

    q, k, v = heads()
    out, mask = compiled(program)(q, k, v)
    torch.testing.assert_close(out, (q @ k.mT).softmax(-1) * mask @ v)


def test_a_mask_shared_by_two_sites_is_one_mask() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.rand(9, 9) > RATE
        return torch.stack([(q @ k.mT).softmax(-1) * mask @ v, (q @ k.mT / 1).softmax(-1) * mask @ v])

    first, second = compiled(program)(*heads())
    assert fuse.report().recovered == 2
    torch.testing.assert_close(first, second)
