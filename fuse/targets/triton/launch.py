"""Triton kernels: rendered modules, loaded from the cache and launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.kernel import sharing
from fuse.kernel.destinations import Unsupported
from fuse.kernel.names import kernel_name
from fuse.kernel.source import ENTRY
from fuse.targets.triton import plan_decode
from fuse.targets.triton.arguments import Arguments, strided
from fuse.targets.triton.copies import Copies
from fuse.targets.triton.launch_decode import TritonDecode
from fuse.targets.triton.launch_tiles import TritonTiles
from fuse.targets.triton.module import Module, current_architecture, from_file, made, precision, processors
from fuse.targets.triton.plan import TritonPlan, candidates, plan_triton
from fuse.targets.triton.plan_choice import PlanChoice
from fuse.targets.triton.plan_decode import Route
from fuse.targets.triton.render import render_triton
from fuse.targets.triton.render_decode import MERGE


class TritonKernel:
    """A loaded kernel of an attention spec; ``module``: another than would be rendered."""

    def __init__(self, spec: AttentionSpec, module: Module | None = None) -> None:
        self._spec = spec
        self.plans = PlanChoice(partial(candidates, spec))
        plan = plan_triton(spec, current_architecture())
        module = module or made(kernel_name(spec), render_triton(spec, plan))
        self.source, self.runs, self.function = module.source, module.runs, module.function(ENTRY, replans=True)
        self._runs, self._arguments = sharing.runs(spec), Arguments(spec)
        self._copies = Copies(spec, ("query", "key", "value"), plan.described)
        self._tiles = TritonTiles(spec, "q")

    @cached_property
    def decode(self) -> TritonDecode:
        """Kernels of decoding, made when the first call has few queries."""
        made = TritonDecode(self._spec)
        made.plans.tune = self.plans.tune
        return made

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """``operands`` as the spec numbers them, ``sizes`` as ``spec.symbols``; the result has ``spec.out_strides``."""
        return self.launch(operands, sizes, None, self._route(operands, sizes))

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The result, and the log-sum-exp of its rows: see fuse.ir.gradient."""
        dtype: torch.dtype = getattr(torch, self._spec.lse_dtype)
        lse = torch.empty(self._spec.lse_shape(sizes), dtype=dtype, device=operands[0].device)
        return self.launch(operands, sizes, lse, self._route(operands, sizes)), lse

    def _route(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Route | None:
        device = operands[0].device
        return plan_decode.route(self._runs, sizes, self.plans.planned(device).block_q, processors(device))

    def launch(self, operands: Sequence[Tensor], sizes: Sequence[int], lse: Tensor | None, route: Route | None) -> Tensor:
        """The result by one of two ways: with a ``route`` rows are packed and keys cut, else blocks are of queries."""
        out = self._launch(operands, sizes, lse, route)
        return out if sizes[self._spec.batch + 1] else out.zero_()  # a sum over no keys, whatever the weights are

    def _launch(self, operands: Sequence[Tensor], sizes: Sequence[int], lse: Tensor | None, route: Route | None) -> Tensor:
        spec = self._spec
        dtype: torch.dtype = getattr(torch, spec.out_dtype)
        out = torch.empty_strided(spec.out_shape(sizes), spec.out_strides(sizes), dtype=dtype, device=operands[0].device)
        if out.numel() == 0:
            return out
        given = self._arguments.of(operands, sizes) | strided("out", out) | {"lse": out if lse is None else lse}
        if route is not None:
            self.decode.attend(route, sizes, out, lse, given)
            return out

        def launch(plan: TritonPlan) -> None:
            grid = (-(-sizes[spec.batch] // plan.block_q) * math.prod(sizes[: spec.batch]),)
            lists, listed = self._tiles.of(given, sizes, plan, out)
            rows, described = self._copies.of(operands, sizes, plan, plan.described)
            self.function[grid](
                given | lists | rows, DESCRIBED=described, LISTED=listed, HAS_LSE=lse is not None,
                PRECISION=precision(), BM=plan.block_q, BN=plan.block_k, num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip

        self.plans.launch(self.source, out.device, sizes[: spec.batch + 2], launch)
        return out

    def tune(self) -> None:
        """Measures plans on the operands of the next calls, where no earlier process has."""
        self.plans.tune = True


class DecodeAlone(TritonKernel):
    """A kernel of few queries from its own ``module``, which takes no other calls."""

    def __init__(self, spec: AttentionSpec, module: Module) -> None:
        super().__init__(spec)
        self.source, self.runs, self.decode = module.source, module.runs, TritonDecode(spec, module)

    def launch(self, operands: Sequence[Tensor], sizes: Sequence[int], lse: Tensor | None, route: Route | None) -> Tensor:
        if route is None:
            raise Unsupported("it computes calls of few queries, and there is none among those that it is run with")
        return super().launch(operands, sizes, lse, route)


def kernel_of(spec: AttentionSpec, path: Path) -> TritonKernel:
    """The kernel of a file, as it is. Raises BuildFailed."""
    module = from_file(path)
    return DecodeAlone(spec, module) if hasattr(module.content, MERGE) else TritonKernel(spec, module)
