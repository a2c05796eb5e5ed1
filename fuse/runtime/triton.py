"""Triton kernels: rendered modules, loaded from the cache and launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fuse import decode, sharing
from fuse.codegen.render import ENTRY
from fuse.codegen.render_triton import render_triton
from fuse.decode import Route
from fuse.planner_triton import Architecture, TritonPlan, candidates
from fuse.runtime.cache import write_once
from fuse.runtime.triton_decode import TritonDecode
from fuse.runtime.triton_launch import Function
from fuse.runtime.triton_module import current_architecture, launched, load, processors
from fuse.spec import AttentionSpec


class TritonKernel:
    """A loaded kernel of an attention spec, planned for ``arch``, by default that of the current device."""

    def __init__(self, spec: AttentionSpec, arch: Architecture | None = None) -> None:
        self._spec = spec
        self._arch = arch or current_architecture()
        self._plans = candidates(spec, self._arch)
        name = f"attention_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}"
        self.source = write_once("triton", name, ".py", render_triton(spec, self.plan))
        self.function = Function(getattr(load(self.source), ENTRY))
        self._runs = sharing.runs(spec)

    @cached_property
    def decode(self) -> TritonDecode:
        """Kernels for few queries, made when the first call has few."""
        return TritonDecode(self._spec, self._arch)

    @property
    def plan(self) -> TritonPlan:
        return self._plans[0]

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """``operands`` as the spec numbers them, ``sizes`` as ``spec.symbols``; the result has ``spec.out_strides``."""
        return self.launch(operands, sizes, None, self._route(operands, sizes))

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The result, and the log-sum-exp of its rows: see fuse.gradient."""
        dtype: torch.dtype = getattr(torch, self._spec.lse_dtype)
        lse = torch.empty(self._spec.lse_shape(sizes), dtype=dtype, device=operands[0].device)
        return self.launch(operands, sizes, lse, self._route(operands, sizes)), lse

    def _route(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Route | None:
        return decode.route(self._runs, sizes, self.plan.block_q, processors(operands[0].device))

    def launch(self, operands: Sequence[Tensor], sizes: Sequence[int], lse: Tensor | None, route: Route | None) -> Tensor:
        """The result by one of two ways: with a ``route`` rows are packed and keys cut, else blocks are of queries."""
        spec = self._spec
        dtype: torch.dtype = getattr(torch, spec.out_dtype)
        strides = spec.out_strides(sizes)
        out = torch.empty_strided(spec.out_shape(sizes), strides, dtype=dtype, device=operands[0].device)
        if out.numel() == 0:
            return out
        views = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in operands]
        extents = [n for t in views for n in (*t.shape, *t.stride())]
        given = (*views, *sizes, *strides, *extents)
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        if route is not None:
            self.decode.attend(route, out, lse, given, precision)
            return out
        arguments = (out, out if lse is None else lse, *given)
        self._plans = launched(self._plans, lambda plan: self._launch(plan, arguments, sizes, lse is not None, precision))
        return out

    def _launch(self, plan: TritonPlan, arguments: Sequence[Any], sizes: Sequence[int], has_lse: bool, precision: str) -> None:
        batch = self._spec.batch
        grid = (-(-sizes[batch] // plan.block_q) * math.prod(sizes[:batch]),)
        self.function[grid](
            *arguments, HAS_LSE=has_lse, PRECISION=precision, BM=plan.block_q, BN=plan.block_k, num_warps=plan.warps,
            num_stages=plan.stages,
        )  # fmt: skip
