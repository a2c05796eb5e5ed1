"""``fuse::attention_weights``: a matrix of weights, from the scores and the log-sum-exp of their rows.

``fuse::attention_rows`` has computed the result, which does not wait for it. ``spec`` is the result's, but for ``weight``, what
is to be written of each probability, and ``out_dtype``. The matrix is dense, of shape (B0, …, q_len, kv_len). If ``heads`` is
not 0 it is the mean over so many neighbouring batch indices, of shape (batch indices / heads, q_len, kv_len). Its gradients are
those of another spec, by the kernels that every spec has; where no gradient arrives nothing is computed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse.errors import TangentOfGradient
from fuse.ir.gradient import differentiable
from fuse.ir.spec import IntLike
from fuse.ir.weights import gradient_spec, weights_shape
from fuse.memoize import memoize
from fuse.ops import attention, batching, levels
from fuse.ops.attention import parsed
from fuse.torch_private import any_tangent, below_autograd

_library: Any = torch.library.Library("fuse", "FRAGMENT")
for _schema in (
    "attention_weights(Tensor[] operands, Tensor lse, SymInt[] sizes, str spec, str target, SymInt heads) -> Tensor",
    "attention_weights_backward(Tensor grad, Tensor[] operands, SymInt[] sizes, str spec, str target, bool[] wanted, "
    "SymInt heads) -> Tensor[]",
):
    _library.define(_schema, tags=attention.TAGS)
_ops: Any = torch.ops.fuse


@cache
def _differentiable(text: str) -> tuple[bool, ...]:
    return differentiable(parsed(text), values=False)


# --------------------------------------------------------------------------------------------------------- kernels


@memoize
def _kernel(text: str, target: str) -> Any:
    from fuse import targets

    return targets.weights_kernel(parsed(text), target)


def _weights(operands: list[Tensor], lse: Tensor, sizes: list[int], spec: str, target: str, heads: int) -> Tensor:
    matrix: Tensor = _kernel(spec, target)(operands, lse, sizes, heads)
    return matrix


@cache
def _gradient_text(spec: str) -> str:
    return gradient_spec(parsed(spec)).to_json()


def _any(x: Tensor) -> bool:
    """Whether a number is not zero. Most matrices tell by a first row; bytes are read many times as fast as numbers."""
    return bool(x[..., :1, :].any()) or bool((x.view(torch.uint8) if x.stride(-1) == 1 else x).any())


def _weights_backward(
    grad: Tensor, operands: list[Tensor], sizes: list[int], spec: str, target: str, wanted: list[bool], heads: int
) -> list[Tensor]:
    """AOTAutograd gives zeros where no gradient arrives."""
    if not _any(grad):
        return [torch.zeros_like(t) for t, w in zip(operands, wanted, strict=True) if w]
    text, batch = _gradient_text(spec), sizes[: parsed(spec).batch]
    each = grad if heads == 0 else (grad / heads)[:, None].expand(-1, heads, -1, -1).reshape(*batch, *grad.shape[1:])
    ones = grad.new_ones((1, 1), dtype=getattr(torch, parsed(text).value.dtype)).expand(grad.shape[-1], 1)
    given = [*operands, ones, each]
    delta, lse = _ops.attention_forward.default(given, sizes, text, target)
    backward = _ops.attention_backward.default
    grads: list[Tensor] = backward(torch.ones_like(delta), given, sizes, delta, lse, text, target, [*wanted, False, False])
    return grads


# ----------------------------------------------------------------------------------------------------------- fakes


def _fake_weights(operands: list[Tensor], lse: Tensor, sizes: list[IntLike], spec: str, target: str, heads: IntLike) -> Tensor:
    of = parsed(spec)
    return operands[0].new_empty(weights_shape(of, sizes, heads), dtype=getattr(torch, of.out_dtype))


def _fake_weights_backward(
    grad: Tensor, operands: list[Tensor], sizes: list[IntLike], spec: str, target: str, wanted: list[bool], heads: IntLike
) -> list[Tensor]:
    return [torch.empty_like(t) for t, w in zip(operands, wanted, strict=True) if w]


# -------------------------------------------------------------------------------------------------------- autograd


class _Weights(levels.Function):
    """Saves what the result's does already; the scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any, lse: Tensor, sizes: list[IntLike], spec: str, target: str, heads: IntLike, *operands: Tensor
    ) -> Tensor:
        with torch.enable_grad(), below_autograd():
            matrix: Tensor = _ops.attention_weights.default(operands, lse, sizes, spec, target, heads)
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)
        ctx.call = sizes, spec, target, heads
        return matrix

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands, (sizes, spec, target, heads) = ctx.saved_tensors, ctx.call
        wanted = [w and d for w, d in zip(ctx.needs_input_grad[5:], _differentiable(spec), strict=True)]
        grads = iter(_ops.attention_weights_backward.default(grad, operands, sizes, spec, target, wanted, heads))
        return (None, None, None, None, None, *(next(grads) if w else None for w in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """PyTorch's own, of the reference."""
        from fuse.targets import reference_tangent

        operands, (sizes, spec, _, heads) = ctx.saved_tensors, ctx.call
        along = [t if d else None for t, d in zip(tangents[5:], _differentiable(spec), strict=True)]
        return reference_tangent.weights_tangent(parsed(spec), operands, along, sizes, heads)


class _WeightsBackward(levels.Function):
    """The backward pass, whose derivative is PyTorch's of the reference."""

    @staticmethod
    def forward(
        ctx: Any, sizes: list[IntLike], spec: str, target: str, wanted: list[bool], heads: IntLike, grad: Tensor,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(grad, *operands)
        ctx.call = sizes, spec, wanted, heads
        with torch.enable_grad(), below_autograd():
            return tuple(_ops.attention_weights_backward.default(grad, operands, sizes, spec, target, wanted, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from fuse.targets import reference

        (grad, *operands), (sizes, spec, wanted, heads) = ctx.saved_tensors, ctx.call
        by_grad, by_operands = reference.weights_second(parsed(spec), grad, operands, sizes, wanted, heads, grads)
        rest = iter(by_operands)
        return (None, None, None, None, None, by_grad, *(next(rest) if w else None for w in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise TangentOfGradient


def _weights_autograd(operands: list[Tensor], lse: Tensor, sizes: list[int], spec: str, target: str, heads: int) -> Tensor:
    if attention.any_gradient(operands, _differentiable(spec)) or any_tangent(operands):
        found: Tensor = levels.apply(_Weights, lse.detach(), sizes, spec, target, heads, *operands)
        return found
    with below_autograd():
        return _ops.attention_weights.default(operands, lse, sizes, spec, target, heads)  # type: ignore[no-any-return]


def _weights_backward_autograd(
    grad: Tensor, operands: list[Tensor], sizes: list[int], spec: str, target: str, wanted: list[bool], heads: int
) -> list[Tensor]:
    tensors = (grad, *operands)
    if attention.any_gradient(tensors, [True] * len(tensors)) or any_tangent(tensors):
        return list(levels.apply(_WeightsBackward, sizes, spec, target, wanted, heads, grad, *operands))
    with below_autograd():
        return list(_ops.attention_weights_backward.default(grad, operands, sizes, spec, target, wanted, heads))


attention.register("attention_weights", _weights, _weights_autograd, _fake_weights, batching.weights_rule)
attention.register(
    "attention_weights_backward", _weights_backward, _weights_backward_autograd, _fake_weights_backward,
    batching.weights_backward_rule,
)  # fmt: skip
