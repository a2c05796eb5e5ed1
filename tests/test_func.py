"""torch.func: a vmap is one more batch index, grad, vjp and jacrev are backward; the rest is left as it is, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fuse

N, D = 20, 8
TANGENTS_ARE_COMPILED = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)  # from then on Dynamo leaves them to eager
Tensors = tuple[Tensor, Tensor, Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(…, N, D) each."""
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def squares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v).square().sum()


def masked_by_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + (v[..., 0] > 0)[:, None, :] * -1e9).softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v


def qkv(*batch: int, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(*batch, N, D) for _ in range(3))
    return q, k, v


def compiled(f: Callable[..., Any], inner: str = "eager", target: str = "reference") -> Callable[..., Any]:
    return torch.compile(f, backend="fuse", options={"inner": inner, "target": target})


def program(f: Callable[..., Any]) -> Callable[..., Any]:
    """Of q, k, v under a name of its own: code that Dynamo traced for one test says nothing of another."""
    return lambda q, k, v: f(q, k, v)


FUSED = {
    "vmap": torch.vmap(causal),
    "vmap over another dimension": torch.vmap(causal, (1, 1, 1), 1),
    "vmap of vmap": torch.vmap(torch.vmap(causal)),
    "vmap over queries, keys shared": lambda q, k, v: torch.vmap(causal, (0, None, None))(q, k[0], v[0]),
    "vmap of a mask for each example": torch.vmap(masked_by_values),
    "grad": torch.func.grad(squares, (0, 1, 2)),
    "vjp": lambda q, k, v: torch.func.vjp(causal, q, k, v)[1](v),
    "vjp of each example by one gradient": lambda q, k, v: torch.vmap(
        lambda q: torch.func.vjp(lambda q: causal(q, k[0], v[0]), q)[1](v[1])[0]
    )(q),
    "gradients of each example": torch.vmap(torch.func.grad(squares, (0, 1, 2))),
    "gradients of each example, keys shared": lambda q, k, v: torch.vmap(
        torch.func.grad(squares, (0, 1)), (0, None, None)
    )(q, k[0], v[0]),
    "jacrev": lambda q, k, v: torch.func.jacrev(lambda q: causal(q, k, v)[0, 0, 1, :2])(q),
}  # fmt: skip


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FUSED)
def test_reverse_mode_and_batches_are_fused(name: str, inner: str) -> None:
    x = qkv(3, 2)
    found = compiled(program(FUSED[name]), inner)(*x)
    torch.testing.assert_close(found, FUSED[name](*x), rtol=1e-4, atol=1e-5)
    assert fuse.report().recovered == len(fuse.report().sites) == 1


def test_gradients_go_through_a_vmap_also_to_what_its_examples_share() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(3, 2))
    function = torch.vmap(causal, (0, None, None))
    expected = torch.autograd.grad(function(q, k[0], v[0]).square().sum(), (q, k, v))
    found = torch.autograd.grad(
        compiled(lambda q, k, v: function(q, k[0], v[0]), "aot_eager")(q, k, v).square().sum(), (q, k, v)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert fuse.report().recovered == 1


LEFT = {
    "jvp": (lambda q, k, v: torch.func.jvp(causal, (q, k, v), (v, q, k))[1], "differentiated by torch.func.jvp"),
    "jacfwd": (lambda q, k, v: torch.func.jacfwd(lambda s: causal(q * s, k, v))(torch.tensor(1.0)), "by torch.func.jvp"),
    "grad of grad": (torch.func.grad(lambda q, k, v: torch.func.grad(squares)(q, k, v).sum()), "differentiated twice"),
    "dropout in a vmap": (torch.vmap(dropped, randomness="different"), "random numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_the_rest_is_left_with_a_reason(name: str) -> None:
    function, reason = LEFT[name]
    x = qkv(2)
    torch.manual_seed(1)
    expected = function(*x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(program(function))(*x), expected, rtol=1e-4, atol=1e-5)
    (site,) = fuse.report().sites
    assert not site.recovered
    assert reason in str(site.reason)


def test_a_gradient_of_a_gradient_of_the_graph_is_left() -> None:
    x = tuple(t.requires_grad_() for t in qkv(2))
    found = torch.autograd.grad(compiled(program(torch.func.grad(squares)), "aot_eager")(*x).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(torch.func.grad(squares)(*x).sum(), x), rtol=1e-4, atol=1e-4)
    assert "differentiated twice" in str(fuse.report().sites[0].reason)


@pytest.mark.compiler
def test_the_kernel_of_a_vmap_is_that_of_all_its_examples() -> None:
    x = qkv(3, 2)
    torch.testing.assert_close(compiled(program(torch.vmap(causal)), target="cpp")(*x), causal(*x), rtol=1e-5, atol=1e-5)
    (site,) = fuse.report().sites
    assert site.spec is not None
    assert (site.spec.batch, site.sizes, site.runs["forward"].by) == (2, (2, 3, N, N), "kernel")


# ------------------------------------------------------------------------------------- around what is compiled already


def test_tangents_go_through_a_compiled_graph() -> None:
    """They come from outside, where no pass sees them: the op has to know its derivative, or it would lose them."""
    q, k, v = qkv(2)
    function = compiled(program(causal), "aot_eager")
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(a, b) for a, b in zip((q, k, v), qkv(2, seed=1), strict=True)]
        found, expected = (forward_ad.unpack_dual(f(*dual)).tangent for f in (function, causal))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert fuse.report().recovered == TANGENTS_ARE_COMPILED


def test_many_gradients_at_once_are_those_of_each() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(2))
    grads = torch.randn(3, 2, N, D)
    found, expected = (
        torch.autograd.grad(f(q, k, v), (q, k, v), grads, is_grads_batched=True)
        for f in (compiled(program(causal), "eager"), causal)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_that_no_pass_saw_is_eagers() -> None:
    def penalty(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in qkv(2)]
        first = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(penalty(compiled(program(causal), "eager")), penalty(causal), rtol=1e-3, atol=1e-4)
    assert fuse.report().recovered == 1
