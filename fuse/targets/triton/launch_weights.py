"""The launch of what writes weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.ir.weights import weights_shape
from fuse.kernel.names import kernel_name
from fuse.targets.triton.arguments import Arguments
from fuse.targets.triton.module import current_architecture, made, precision
from fuse.targets.triton.plan import TritonPlan, candidates, plan_triton
from fuse.targets.triton.plan_choice import PlanChoice
from fuse.targets.triton.render_weights import WEIGHTS, render_weights


class TritonWeights:
    """A loaded kernel of weights. Its plans are those of the result's kernel, of which it holds less."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec, self._arguments = spec, Arguments(spec)
        self._plans = PlanChoice(partial(candidates, spec))
        module = made(kernel_name(spec, "weights"), render_weights(spec, plan_triton(spec, current_architecture())))
        self.source, self.runs, self.function = module.source, module.runs, module.function(WEIGHTS, replans=True)

    def __call__(self, operands: Sequence[Tensor], lse: Tensor, sizes: Sequence[int], heads: int) -> Tensor:
        """See fuse.targets.protocols.WeightsKernel."""
        shape, dtype = weights_shape(self._spec, sizes, heads), getattr(torch, self._spec.out_dtype)
        out = torch.empty(shape, dtype=dtype, device=operands[0].device)
        given = self._arguments.of(operands, sizes) | {"out": out, "lse": lse.contiguous(), "heads": heads or 1}
        q_len, kv_len = sizes[self._spec.batch : self._spec.batch + 2]
        groups = math.prod(sizes[: self._spec.batch]) // (heads or 1)

        def launch(plan: TritonPlan) -> None:
            grid = (groups * -(-q_len // plan.block_q) * -(-kv_len // plan.block_k),)
            self.function[grid](
                given, PRECISION=precision(), BM=plan.block_q, BN=plan.block_k, num_warps=plan.warps, num_stages=1
            )

        if out.numel():
            self._plans.launch(self.source, out.device, sizes[: self._spec.batch + 2], launch)
        return out
