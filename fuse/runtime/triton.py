"""Triton kernels: rendered modules, loaded from the cache and launched."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from fuse.codegen.render import ENTRY
from fuse.codegen.render_triton import render_triton
from fuse.planner_triton import ARCHITECTURES, Architecture, architecture, candidates
from fuse.runtime.cache import write_once
from fuse.spec import AttentionSpec


class TritonKernel:
    """A loaded kernel of an attention spec, planned for ``arch``, by default that of the current device."""

    def __init__(self, spec: AttentionSpec, arch: Architecture | None = None) -> None:
        self._spec = spec
        self._plans = candidates(spec, arch or current_architecture())
        self.plan = self._plans[0]
        name = f"attention_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}"
        self.source = write_once("triton", name, ".py", render_triton(spec, self.plan))
        self.function: Any = getattr(_module(self.source), ENTRY)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """``operands`` as the spec numbers them, ``sizes`` as ``spec.symbols``; the result has ``spec.out_strides``."""
        return self._attend(operands, sizes, None)

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The result, and the log-sum-exp of its rows: see fuse.gradient."""
        dtype: torch.dtype = getattr(torch, self._spec.lse_dtype)
        lse = torch.empty(self._spec.lse_shape(sizes), dtype=dtype, device=operands[0].device)
        return self._attend(operands, sizes, lse), lse

    def _attend(self, operands: Sequence[Tensor], sizes: Sequence[int], lse: Tensor | None) -> Tensor:
        spec = self._spec
        dtype: torch.dtype = getattr(torch, spec.out_dtype)
        strides = spec.out_strides(sizes)
        out = torch.empty_strided(spec.out_shape(sizes), strides, dtype=dtype, device=operands[0].device)
        if out.numel() == 0:
            return out
        views = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in operands]
        extents = [n for t in views for n in (*t.shape, *t.stride())]
        arguments = (out, out if lse is None else lse, *views, *sizes, *strides, *extents)
        while True:
            try:
                self._launch(arguments, sizes, lse is not None)
                return out
            except OutOfResources:  # the planner's model is no proof
                self._plans = self._plans[1:]
                if not self._plans:
                    raise
                self.plan = self._plans[0]

    def _launch(self, arguments: tuple[Any, ...], sizes: Sequence[int], has_lse: bool) -> None:
        spec, plan = self._spec, self.plan
        grid = (-(-sizes[spec.batch] // plan.block_q) * math.prod(sizes[: spec.batch]),)
        self.function[grid](
            *arguments, HAS_LSE=has_lse, PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            BM=plan.block_q, BN=plan.block_k, num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip


def current_architecture() -> Architecture:
    """Of the current device; without one, as in Triton's interpreter, a common one."""
    try:
        target = driver.active.get_current_target()
    except RuntimeError:
        return ARCHITECTURES["sm_80"]
    return architecture(target.arch if target.backend == "hip" else f"sm_{target.arch}")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fuse_generated_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
