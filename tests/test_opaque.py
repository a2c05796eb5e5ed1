"""Custom operators beside attention, whose derivative asks a tensor for a number, do not break the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import attend, heads
from torch import Tensor

import fuse

INNERS = ("aot_eager", "inductor")


@torch.library.custom_op("fuse_tests::scaled_rows", mutates_args=())
def scaled_rows(x: Tensor, count: Tensor) -> Tensor:
    """Twice the first ``count`` rows, the others as they are."""
    out = x.clone()
    out[: int(count)] *= 2
    return out


@torch.library.custom_op("fuse_tests::squared_rows", mutates_args=())
def squared_rows(x: Tensor, count: Tensor) -> Tensor:
    return scaled_rows(x, count) * x


@scaled_rows.register_fake
@squared_rows.register_fake
def _(x: Tensor, count: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_count(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _keep_result(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output)


def _scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (count,) = ctx.saved_tensors
    return torch.cat((grad[: count.item()] * 2, grad[count.item() :])), None


def _squared_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    x, count, result = ctx.saved_tensors
    return grad * result / x * (2 if count.item() >= 0 else 0), None


scaled_rows.register_autograd(_scaled_backward, setup_context=_keep_count)
squared_rows.register_autograd(_squared_backward, setup_context=_keep_result)


@pytest.mark.parametrize("inner", INNERS)
def test_a_derivative_that_reads_a_number_is_one_node(inner: str) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Tensor:
        return scaled_rows(attend(q, k, v), count=count).add_(1)  # what it gave is written to

    def model(q: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Tensor:
        return layer(layer(q, k, v, count), k, v, count).square().sum()

    q, k, v = (x.requires_grad_() for x in heads())
    for count in (torch.tensor(1), torch.tensor(2)):
        run = torch.compile(model, backend="fuse", options={"inner": inner, "target": "reference"})
        found = torch.autograd.grad(run(q, k, v, count), (q, k, v))
        expected = torch.autograd.grad(model(q, k, v, count), (q, k, v))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (len(fuse.report().sites), fuse.report().recovered) == (2, 2)


def test_one_that_keeps_its_result_is_left_to_dynamo() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Tensor:
        return squared_rows(attend(q, k, v), count).sum()

    q, k, v = (x.requires_grad_() for x in heads())
    run = torch.compile(model, backend="fuse", options={"inner": "aot_eager", "target": "reference"})
    found = torch.autograd.grad(run(q, k, v, torch.tensor(1)), (q, k, v))
    expected = torch.autograd.grad(model(q, k, v, torch.tensor(1)), (q, k, v))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.library.custom_op("fuse_tests::weighted", mutates_args=())
def weighted(weight: Tensor, x: Tensor, count: Tensor) -> Tensor:
    return weight * x * int(count)


@weighted.register_fake
def _(weight: Tensor, x: Tensor, count: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_arguments(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weighted_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Gives both, wanted or not, as most derivatives do."""
    weight, x, count = ctx.saved_tensors
    return grad * x * count.item(), grad * weight * count.item(), None


weighted.register_autograd(_weighted_backward, setup_context=_keep_arguments)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("inner", INNERS)
def test_gradients_that_nobody_wants_are_dropped(inner: str, wanted: tuple[bool, bool]) -> None:
    def model(weight: Tensor, q: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Tensor:
        return weighted(weight, attend(q, k, v), count).square().sum()

    weight, q, k, v = torch.randn(2, 3, 9, 16), *heads()
    leaves = [x.requires_grad_() for x, w in zip((weight, q), wanted, strict=True) if w]
    run = torch.compile(model, backend="fuse", options={"inner": inner, "target": "reference"})
    found = torch.autograd.grad(run(weight, q, k, v, torch.tensor(2)), leaves)
    expected = torch.autograd.grad(model(weight, q, k, v, torch.tensor(2)), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
