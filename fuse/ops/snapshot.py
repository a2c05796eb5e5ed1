"""``fuse::snapshot``: what a tensor held before the graph writes to it, for the backward pass.

``torch.clone`` would not do: the inner compiler may compute it again in the backward pass, from what the tensor holds then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse.ops import levels
from fuse.torch_private import VmapInfo, any_tangent, below_autograd

_library: Any = torch.library.Library("fuse", "FRAGMENT")
_library.define("snapshot(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


class _Snapshot(levels.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return _below(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _below(x: Tensor) -> Tensor:
    with below_autograd():
        result: Tensor = torch.ops.fuse.snapshot.default(x)
        return result


def _autograd(x: Tensor) -> Tensor:
    if any_tangent((x,)):
        return x.clone()  # takes the tangent along
    result: Tensor = levels.apply(_Snapshot, x) if x.requires_grad and torch.is_grad_enabled() else _below(x)
    return result


def _batching_rule(_: VmapInfo, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
    return torch.ops.fuse.snapshot.default(x), in_dims[0]


_library.impl("snapshot", torch.clone, "CompositeExplicitAutograd")
_library.impl("snapshot", _autograd, "Autograd")
torch.library.register_fake("fuse::snapshot", torch.clone, lib=_library)
torch.library.register_vmap("fuse::snapshot", _batching_rule, lib=_library)
