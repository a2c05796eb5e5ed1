"""``fuse::attention``, the one op that the passes put into a graph, and the two that it runs as where gradients are needed.

``fuse::attention_lse`` is the same with the rows' log-sum-exp as a second result, for code that merges parts of the keys;
``fuse::attention_rows`` has it a third time, as kernels keep it, for ``fuse::attention_weights`` (fuse.ops.weights);
``fuse::attention_max`` gives the largest score of each row, by the reference: who asks for it watches a training run.
``fuse::attention`` has an autograd kernel: with gradients it is ``fuse::attention_forward``, whose backward is
``fuse::attention_backward``; without, it stays what it is. So AOTAutograd, Inductor and checkpoint policies see plain ops.
The spec travels as text: torch's graph caches are keyed on it, and a graph with the op in it can be saved. Defined with
``torch.library.Library`` since ``custom_op`` costs several times as much per call, and ``register_autograd`` more still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse.errors import TangentOfGradient
from fuse.ir.gradient import differentiable
from fuse.ir.spec import AttentionSpec, IntLike
from fuse.memoize import memoize
from fuse.ops import batching, levels
from fuse.targets import registry
from fuse.torch_private import any_tangent, below_autograd
from fuse.when_imported import when_imported

# Kernels take any strides: a copy into another layout would cost and gain nothing.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_library: Any = torch.library.Library("fuse", "DEF")
for _schema in (
    "attention(Tensor[] operands, SymInt[] sizes, str spec, str target) -> Tensor",
    "attention_lse(Tensor[] operands, SymInt[] sizes, str spec, str target) -> (Tensor, Tensor)",
    "attention_rows(Tensor[] operands, SymInt[] sizes, str spec, str target) -> (Tensor, Tensor, Tensor)",
    "attention_max(Tensor[] operands, SymInt[] sizes, str spec) -> Tensor",
    "attention_forward(Tensor[] operands, SymInt[] sizes, str spec, str target) -> (Tensor, Tensor)",
    "attention_backward(Tensor grad_out, Tensor[] operands, SymInt[] sizes, Tensor out, Tensor lse, str spec, str target, "
    "bool[] wanted, Tensor? grad_lse=None) -> Tensor[]",
    "attention_in_python(Tensor[] operands, SymInt[] sizes, str spec, str target) -> Tensor",
    "attention_forward_in_python(Tensor[] operands, SymInt[] sizes, str spec, str target) -> (Tensor, Tensor)",
    "attention_backward_in_python(Tensor grad_out, Tensor[] operands, SymInt[] sizes, Tensor out, Tensor lse, str spec, "
    "str target, bool[] wanted, Tensor? grad_lse=None) -> Tensor[]",
):
    _library.define(_schema, tags=TAGS)


@cache
def parsed(text: str) -> AttentionSpec:
    return AttentionSpec.from_json(text)


@cache
def differentiable_operands(text: str) -> tuple[bool, ...]:
    return differentiable(parsed(text))


# --------------------------------------------------------------------------------------------------------- kernels

# runtime is imported when the first kernel is run: tracing or saving a graph does not need it.


@memoize
def _kernel(text: str, target: str) -> Any:
    from fuse import targets

    return _known_as(text, targets.kernel(parsed(text), target))


@memoize
def _backward_kernel(text: str, target: str, wanted: tuple[bool, ...]) -> Any:
    from fuse import targets

    return _known_as(text, targets.backward_kernel(parsed(text), target, wanted))


def _known_as(text: str, kernel: Any) -> Any:
    from fuse.targets.protocols import Direct

    if isinstance(kernel, Direct):
        kernel.known_as(text)
    return kernel


def _attention(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> Tensor:
    out: Tensor = _kernel(spec, target)(operands, sizes)
    return out


def _attention_lse(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> tuple[Tensor, Tensor]:
    out, lse = _forward(operands, sizes, spec, target)
    return out, _log_sum(out, lse, spec)


def _attention_rows(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _forward(operands, sizes, spec, target)
    return out, _log_sum(out, lse, spec), lse


def _attention_max(operands: list[Tensor], sizes: list[int], spec: str) -> Tensor:
    from fuse.targets import reference

    return reference.attention_max(parsed(spec), operands, sizes)


def _log_sum(out: Tensor, lse: Tensor, spec: str) -> Tensor:
    """Log-sum-exp to base e as others know it. Kernels have infinity for a row that sees nothing: its probabilities are 0."""
    nothing = (lse == math.inf) & ~out[..., 0].isnan()
    return torch.where(nothing, -math.inf, lse).to(getattr(torch, parsed(spec).lse_dtype))


def _forward(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> tuple[Tensor, Tensor]:
    out, lse = _kernel(spec, target).forward(operands, sizes)
    return out, lse


def _backward(
    grad_out: Tensor, operands: list[Tensor], sizes: list[int], out: Tensor, lse: Tensor, spec: str, target: str,
    wanted: list[bool], grad_lse: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    of_lse = None if grad_lse is None else grad_lse.contiguous()
    grads: list[Tensor] = _backward_kernel(spec, target, tuple(wanted))(grad_out, operands, sizes, out, lse, of_lse)
    return grads


# ----------------------------------------------------------------------------------------------------------- fakes


def fake(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str) -> Tensor:
    parsed_spec = parsed(spec)
    dtype: torch.dtype = getattr(torch, parsed_spec.out_dtype)
    shape, strides = parsed_spec.out_shape(sizes), parsed_spec.out_strides(sizes)
    return torch.empty_strided(shape, strides, dtype=dtype, device=operands[0].device)


def fake_forward(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str) -> tuple[Tensor, Tensor]:
    parsed_spec, out = parsed(spec), fake(operands, sizes, spec, target)
    return out, out.new_empty(parsed_spec.lse_shape(sizes), dtype=getattr(torch, registry.named(target).lse_dtype(parsed_spec)))


def _fake_lse(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str) -> tuple[Tensor, Tensor]:
    parsed_spec, out = parsed(spec), fake(operands, sizes, spec, target)
    return out, out.new_empty(parsed_spec.lse_shape(sizes), dtype=getattr(torch, parsed_spec.lse_dtype))


def _fake_rows(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str) -> tuple[Tensor, Tensor, Tensor]:
    _, lse = fake_forward(operands, sizes, spec, target)
    return *_fake_lse(operands, sizes, spec, target), lse


def _fake_max(operands: list[Tensor], sizes: list[IntLike], spec: str) -> Tensor:
    parsed_spec = parsed(spec)
    return operands[0].new_empty(parsed_spec.lse_shape(sizes), dtype=getattr(torch, parsed_spec.lse_dtype))


def _fake_backward(
    grad_out: Tensor, operands: list[Tensor], sizes: list[IntLike], out: Tensor, lse: Tensor, spec: str, target: str,
    wanted: list[bool], grad_lse: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients have the layout that ``torch.empty_like`` gives their operands."""
    return [torch.empty_like(t) for t, w in zip(operands, wanted, strict=True) if w]


# -------------------------------------------------------------------------------------------------------- autograd


class _Attention(levels.Function):
    """Saves the operands, the result and the log-sum-exp of its rows; the scores are computed again.

    count  of the results: the result, the log-sum-exp as others know it, and as kernels keep it
    """

    @staticmethod
    def forward(ctx: Any, sizes: list[IntLike], spec: str, target: str, count: int, *operands: Tensor) -> Any:
        with torch.enable_grad(), below_autograd():
            out, lse = torch.ops.fuse.attention_forward.default(operands, sizes, spec, target)
            results = (out, _log_sum(out, lse, spec), lse)[:count] if count > 1 else out
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(out, lse, *operands)
        ctx.save_for_forward(out, lse, *operands)
        ctx.set_materialize_grads(False)
        ctx.call = sizes, spec, target, count
        return results

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None, _: object = None
    ) -> tuple[Tensor | None, ...]:
        """The log-sum-exp of a row that sees nothing is constant."""
        (out, lse, *operands), (sizes, spec, target, _) = ctx.saved_tensors, ctx.call
        wanted = [w and d for w, d in zip(ctx.needs_input_grad[4:], differentiable_operands(spec), strict=True)]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            grad_lse = grad_lse.to(lse.dtype).masked_fill(lse == math.inf, 0)
        call = torch.ops.fuse.attention_backward.default
        grads = iter(call(grad_out, operands, sizes, out, lse, spec, target, wanted, grad_lse))
        return (None, None, None, None, *(next(grads) if w else None for w in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """No kernel has it: the reference is plain PyTorch."""
        from fuse.targets import reference_tangent

        (_, _, *operands), (sizes, spec, _, count) = ctx.saved_tensors, ctx.call
        used = [t if d else None for t, d in zip(tangents[4:], differentiable_operands(spec), strict=True)]
        along = reference_tangent.attention_tangent(parsed(spec), operands, used, sizes)
        return (*along, None)[:count] if count > 1 else along[0]


class _Backward(levels.Function):
    """The backward pass, whose derivative is PyTorch's of the reference: no kernel has it."""

    @staticmethod
    def forward(
        ctx: Any, sizes: list[IntLike], spec: str, target: str, wanted: list[bool], grad_out: Tensor, out: Tensor, lse: Tensor,
        grad_lse: Tensor | None, *operands: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(grad_out, grad_lse, *operands)
        ctx.call = sizes, spec, wanted
        with torch.enable_grad(), below_autograd():
            call = torch.ops.fuse.attention_backward.default
            return tuple(call(grad_out, operands, sizes, out, lse, spec, target, wanted, grad_lse))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As if the result and the log-sum-exp were computed again from the operands."""
        from fuse.targets import reference

        (grad_out, grad_lse, *operands), (sizes, spec, wanted) = ctx.saved_tensors, ctx.call
        given = (grad_out,) if grad_lse is None else (grad_out, grad_lse)
        by_given, by_operands = reference.attention_second(parsed(spec), given, operands, sizes, wanted, grads)
        by_grad_out, by_grad_lse = (*by_given, None)[:2]
        rest = iter(by_operands)
        return (None, None, None, None, by_grad_out, None, None, by_grad_lse, *(next(rest) if w else None for w in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise TangentOfGradient


def any_gradient(tensors: Sequence[Tensor], differentiable: Sequence[bool]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad and d for t, d in zip(tensors, differentiable, strict=True))


def _attention_autograd(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> Tensor:
    result: Tensor = _autograd(torch.ops.fuse.attention.default, operands, sizes, spec, target, count=1)
    return result


def _lse_autograd(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _autograd(torch.ops.fuse.attention_lse.default, operands, sizes, spec, target, count=2)
    return result


def _rows_autograd(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _autograd(
        torch.ops.fuse.attention_rows.default, operands, sizes, spec, target, count=3
    )
    return result


def _max_autograd(operands: list[Tensor], sizes: list[int], spec: str) -> Tensor:
    """Has no gradient, as that of FlexAttention."""
    with below_autograd():
        result: Tensor = torch.ops.fuse.attention_max.default(operands, sizes, spec)
        return result


def _autograd(op: Any, operands: list[Tensor], sizes: list[int], spec: str, target: str, count: int) -> Any:
    """Runs eagerly and while AOTAutograd traces."""
    if any_gradient(operands, differentiable_operands(spec)) or any_tangent(operands):
        return levels.apply(_Attention, sizes, spec, target, count, *operands)
    with below_autograd():
        return op(operands, sizes, spec, target)


def _backward_autograd(
    grad_out: Tensor, operands: list[Tensor], sizes: list[int], out: Tensor, lse: Tensor, spec: str, target: str,
    wanted: list[bool], grad_lse: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    tensors = (grad_out, out, *operands, *([] if grad_lse is None else [grad_lse]))
    if any_gradient(tensors, [True] * len(tensors)) or any_tangent(tensors):
        return list(levels.apply(_Backward, sizes, spec, target, wanted, grad_out, out, lse, grad_lse, *operands))
    with below_autograd():
        grads: list[Tensor] = torch.ops.fuse.attention_backward.default(
            grad_out, operands, sizes, out, lse, spec, target, wanted, grad_lse
        )
        return grads


def register(name: str, kernel: Any, autograd: Any, fake: Any, batching_rule: Any) -> None:
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"fuse::{name}", fake, lib=_library)
    torch.library.register_vmap(f"fuse::{name}", batching_rule, lib=_library)


register("attention", _attention, _attention_autograd, fake, batching.attention_rule)
register("attention_lse", _attention_lse, _lse_autograd, _fake_lse, batching.lse_rule)
register("attention_rows", _attention_rows, _rows_autograd, _fake_rows, batching.rows_rule)
register("attention_max", _attention_max, _max_autograd, _fake_max, batching.max_rule)
register("attention_forward", _forward, None, fake_forward, batching.forward_rule)
register("attention_backward", _backward, _backward_autograd, _fake_backward, batching.backward_rule)
# What these are called by has taken the place of those without "in_python", on CPUs: templates/cpp/op.cpp.
_library.impl("attention_in_python", _attention, "CompositeExplicitAutograd")
_library.impl("attention_in_python", _attention_autograd, "Autograd")
_library.impl("attention_forward_in_python", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward_in_python", _backward, "CompositeExplicitAutograd")
_library.impl("attention_backward_in_python", _backward_autograd, "Autograd")
_library.impl("attention_backward", batching.legacy_backward_rule, "Batched")


def _shard(_: object) -> None:
    """Registers the rule for DTensors, as soon as there can be any."""
    import_module("fuse.ops.sharding")


when_imported("torch.distributed.tensor", _shard)
