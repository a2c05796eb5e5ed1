"""Problems as calls that are expected, as qualification knows them."""

from __future__ import annotations

import torch
from problems import Problem

from fuse.ir.gradient import differentiable
from fuse.ops.warm import ExpectedCall


def call_of(p: Problem, target: str) -> ExpectedCall:
    metas = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in p.operands)
    return ExpectedCall(p.spec.to_json(), target, tuple(metas), tuple(p.sizes), torch.device("cpu"))


def wanted_of(p: Problem) -> tuple[bool, ...]:
    return tuple(d and t.is_floating_point() for t, d in zip(p.operands, differentiable(p.spec), strict=True))
