"""``fuse::attention``, the one op that the passes put into a graph.

The spec travels as text: torch's graph caches are keyed on it, and a graph with the op in it can be saved. Defined with
``torch.library.Library`` since ``custom_op`` costs several times as much per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fuse import reference
from fuse.spec import AttentionSpec, IntLike

Kernel = Callable[[Sequence[Tensor], Sequence[int]], Tensor]

SCHEMA = "attention(Tensor[] operands, SymInt[] sizes, str spec, str target) -> Tensor"

# Kernels take any strides: a copy into another layout would cost and gain nothing.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_library: Any = torch.library.Library("fuse", "DEF")
_library.define(SCHEMA, tags=_TAGS)


@cache
def parsed(text: str) -> AttentionSpec:
    return AttentionSpec.from_json(text)


@cache
def _kernel(text: str, target: str) -> Kernel:
    spec = parsed(text)
    if target == "reference":
        return lambda operands, sizes: reference.attention(spec, operands, sizes, "eager")
    from fuse import runtime  # builds kernels: not needed to trace or to save a graph

    return runtime.kernel(spec, target)


def _attention(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> Tensor:
    return _kernel(spec, target)(operands, sizes)


def _autograd(operands: list[Tensor], sizes: list[int], spec: str, target: str) -> Tensor:
    """Runs eagerly and while AOTAutograd traces, so that no gradient is lost in silence."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        raise NotImplementedError("fuse::attention has no gradient: call it under torch.no_grad() or detach its operands")
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = torch.ops.fuse.attention.default(operands, sizes, spec, target)
        return result


def _fake(operands: list[Tensor], sizes: list[IntLike], spec: str, target: str) -> Tensor:
    parsed_spec = parsed(spec)
    dtype: torch.dtype = getattr(torch, parsed_spec.out_dtype)
    shape, strides = parsed_spec.out_shape(sizes), parsed_spec.out_strides(sizes)
    return torch.empty_strided(shape, strides, dtype=dtype, device=operands[0].device)


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention", _autograd, "Autograd")
torch.library.register_fake("fuse::attention", _fake, lib=_library)
