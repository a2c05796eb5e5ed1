"""Gradients of named problems, and whether they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from problems import Problem, own_products, rand
from torch import Tensor

from fuse.targets import reference


def floats(p: Problem) -> tuple[bool, ...]:
    return tuple(t.is_floating_point() for t in p.operands)


def run(p: Problem, backward: Callable[..., list[Tensor]], grad_lse: Tensor | None = None) -> list[Tensor]:
    """The gradients for a random gradient of the result, and for that of its rows' log-sum-exp."""
    with own_products():
        out, lse = reference.attention_with_lse(p.spec, p.operands, p.sizes, "eager")
    return backward(grad_out(p), p.operands, p.sizes, out, lse, grad_lse)


def grad_out(p: Problem) -> Tensor:
    return rand(*p.spec.out_shape(p.sizes), dtype=p.spec.out_dtype, seed=9)


def check(p: Problem, found: Sequence[Tensor], wanted: Sequence[bool], grad_lse: Tensor | None = None) -> None:
    """Fails unless gradients are laid out as promised, and err at most twice as much as eager's, and a few roundings."""
    with own_products():
        exact, eager = (
            reference.attention_backward(p.spec, grad_out(p), p.operands, p.sizes, wanted, way, grad_lse)
            for way in ("exact", "eager")
        )
    operands = [t for t, w in zip(p.operands, wanted, strict=True) if w]
    for t, x, e, s in zip(operands, found, exact, eager, strict=True):
        assert x.shape == t.shape and x.dtype == t.dtype and x.stride() == torch.empty_like(t).stride()
        assert torch.equal(x.isnan(), s.isnan()), "NaN where eager has none, or none where eager has NaN"
        if x.numel():
            scale = e.nan_to_num().abs().amax()
            allowed = 2 * (s.double() - e).nan_to_num().abs().amax() + 16 * torch.finfo(x.dtype).eps * max(scale, 1)
            error = (x.double() - e).nan_to_num().abs().amax()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
