"""``fuse::context_attention``: attention of a sequence that lies on several ranks, of which this one has a shard.

``operands``, ``sizes`` and ``spec`` are those of the attention of the shard by itself, with the places of its queries and keys
in the sequence as symbols; ``plan`` says who has the rest (fuse.parallel.plan). Every rank of the group has to make the call.
Nothing of other ranks is kept for the backward pass: keys travel again, and what each rank finds for them goes to their owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse.errors import NotBatched, TangentOfGradient
from fuse.ir.spec import IntLike
from fuse.ops import attention, levels
from fuse.parallel import gather, ring
from fuse.parallel.alike import check_alike
from fuse.parallel.call import Call
from fuse.parallel.layout import joined
from fuse.parallel.plan import Plan
from fuse.torch_private import any_tangent, below_autograd

_library: Any = torch.library.Library("fuse", "FRAGMENT")
for _schema in (
    "context_attention(Tensor[] operands, SymInt[] sizes, str spec, str target, str plan) -> Tensor",
    "context_attention_forward(Tensor[] operands, SymInt[] sizes, str spec, str target, str plan) -> (Tensor, Tensor)",
    "context_attention_backward(Tensor grad_out, Tensor[] operands, SymInt[] sizes, Tensor out, Tensor lse, str spec, "
    "str target, str plan, bool[] wanted) -> Tensor[]",
):
    _library.define(_schema, tags=attention.TAGS)
_ops: Any = torch.ops.fuse


# --------------------------------------------------------------------------------------------------------- kernels


def _way(call: Call) -> Any:
    """The module that computes ``call``; every rank of the group decides alike."""
    if not call.merges or call.plan.way == "gather":
        return gather
    return ring if call.plan.way == "ring" or _gathered(call) > _own(call) else gather


def _gathered(call: Call) -> int:
    """Elements that all keys take which a rank's queries see, on the rank that sees most."""
    seen = max(sum(stop - start for start, stop in joined(extents)) for extents in call.needs)
    return sum(x[:1].numel() for x in call.keys) * seen


def _own(call: Call) -> int:
    """Elements of a rank's queries and results."""
    queries = sum(call.operands[i].numel() for i, _ in call.plan.queries)
    return queries + torch.Size(call.spec.out_shape(call.sizes)).numel()


def _call(operands: Sequence[Tensor], sizes: Sequence[int], spec: str, target: str, plan: str) -> Call:
    return Call(tuple(operands), tuple(sizes), spec, target, Plan.from_json(plan))


def _attention(operands: list[Tensor], sizes: list[int], spec: str, target: str, plan: str) -> Tensor:
    return _forward(operands, sizes, spec, target, plan)[0]


def _forward(operands: list[Tensor], sizes: list[int], spec: str, target: str, plan: str) -> tuple[Tensor, Tensor]:
    call = _call(operands, sizes, spec, target, plan)
    call.check_positions()
    if call.plan.compares:
        check_alike(call)
    out, lse = _way(call).forward(call)
    return out, lse


def _backward(
    grad_out: Tensor, operands: list[Tensor], sizes: list[int], out: Tensor, lse: Tensor, spec: str, target: str, plan: str,
    wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    call = _call(operands, sizes, spec, target, plan)
    grads: list[Tensor] = _way(call).backward(call, grad_out, out, lse, wanted)
    return grads


# ----------------------------------------------------------------------------------------------------------- fakes


def _fake(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str, plan: str) -> Tensor:
    return attention.fake(operands, sizes, spec, target)


def _fake_forward(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str, plan: str) -> tuple[Tensor, Tensor]:
    return attention.fake_forward(operands, sizes, spec, target)


def _fake_backward(
    grad_out: Tensor, operands: list[Tensor], sizes: list[IntLike], out: Tensor, lse: Tensor, spec: str, target: str, plan: str,
    wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, w in zip(operands, wanted, strict=True) if w]


# -------------------------------------------------------------------------------------------------------- autograd


class _Attention(levels.Function):
    """Saves this rank's operands, its result and the log-sum-exp of its rows."""

    @staticmethod
    def forward(ctx: Any, sizes: list[IntLike], spec: str, target: str, plan: str, *operands: Tensor) -> Tensor:
        with torch.enable_grad(), below_autograd():
            out, lse = _ops.context_attention_forward.default(operands, sizes, spec, target, plan)
        ctx.save_for_backward(out, lse, *operands)
        ctx.call = sizes, spec, target, plan
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (out, lse, *operands), (sizes, spec, target, plan) = ctx.saved_tensors, ctx.call
        reached = attention.differentiable_operands(spec)
        wanted = [w and d for w, d in zip(ctx.needs_input_grad[4:], reached, strict=True)]
        call = _ops.context_attention_backward.default
        grads = iter(call(grad_out, operands, sizes, out, lse, spec, target, plan, wanted))
        return (None, None, None, None, *(next(grads) if w else None for w in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise TangentOfGradient


def _autograd(operands: list[Tensor], sizes: list[int], spec: str, target: str, plan: str) -> Tensor:
    if attention.any_gradient(operands, attention.differentiable_operands(spec)) or any_tangent(operands):
        result: Tensor = levels.apply(_Attention, sizes, spec, target, plan, *operands)
        return result
    with below_autograd():
        return _ops.context_attention.default(operands, sizes, spec, target, plan)  # type: ignore[no-any-return]


def _not_batched(*_: Any) -> None:
    raise NotBatched


attention.register("context_attention", _attention, _autograd, _fake, _not_batched)
attention.register("context_attention_forward", _forward, None, _fake_forward, _not_batched)
attention.register("context_attention_backward", _backward, None, _fake_backward, _not_batched)
