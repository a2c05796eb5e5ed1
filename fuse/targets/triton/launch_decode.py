"""The launch of decoding kernels: parts of the keys, and what merges them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.kernel.names import kernel_name
from fuse.kernel.source import ENTRY
from fuse.targets.triton import plan_decode
from fuse.targets.triton.module import Module, current_architecture, made, precision
from fuse.targets.triton.plan import TritonPlan
from fuse.targets.triton.plan_choice import PlanChoice
from fuse.targets.triton.plan_decode import Route
from fuse.targets.triton.render_decode import MERGE, render_decode


class TritonDecode:
    """A loaded pair of kernels of an attention spec; ``module``: another than would be rendered."""

    def __init__(self, spec: AttentionSpec, module: Module | None = None) -> None:
        self._spec = spec
        self.plans = PlanChoice(partial(plan_decode.plans, spec))
        rendered = render_decode(spec, plan_decode.plans(spec, current_architecture())[0])
        module = module or made(kernel_name(spec, "decode"), rendered)
        self.source, self.function, self.merge = module.source, module.function(ENTRY, replans=True), module.function(MERGE)

    def attend(self, route: Route, sizes: Sequence[int], out: Tensor, lse: Tensor | None, given: dict[str, Any]) -> None:
        """Writes ``out``, and ``lse`` where it is wanted. ``given``: the arguments that the forward kernel has, too."""
        spec, whole = self._spec, route.parts == 1
        dtype: torch.dtype = getattr(torch, spec.lse_dtype)
        rows = (route.parts, route.groups, route.rows)
        shapes = {"parts_m": rows, "parts_l": rows, "parts_acc": (*rows, spec.v_dim)}
        parts = {n: out if whole else torch.empty(shape, dtype=dtype, device=out.device) for n, shape in shapes.items()}
        arguments = given | parts | {"parts": route.parts}

        def launch(plan: TritonPlan) -> None:
            rows = plan_decode.block(route.rows, plan.block_q)
            programs = route.groups * -(-route.rows // rows)
            options = {"HAS_LSE": lse is not None, "PRECISION": precision(), "BM": rows, "BN": plan.block_k,
                       "num_warps": plan.warps}  # fmt: skip
            self.function[(programs, route.parts)](arguments, WHOLE=whole, num_stages=plan.stages, **options)
            if not whole:
                self.merge[(programs,)](arguments, num_stages=1, **options)

        self.plans.launch(self.source, out.device, sizes[: spec.batch + 2], launch)
