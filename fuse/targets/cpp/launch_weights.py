"""C++ kernels of weights: built as those of forward are, and called with the same arguments and one more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.ir.weights import weights_shape
from fuse.kernel.names import kernel_name
from fuse.report.runs import Runs
from fuse.targets import reference
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import Built, Library, Rendered, build_source
from fuse.targets.cpp.plan import lse_dtype, weights_plan
from fuse.targets.cpp.render_weights import render_weights


def build_weights(spec: AttentionSpec, isa: str | None = None) -> Built:
    """The built kernel of the weights of ``spec``. Raises BuildFailed, and Unsupported."""
    return build_source(*rendered_weights(spec, isa))


def rendered_weights(spec: AttentionSpec, isa: str | None = None) -> Rendered:
    plan = weights_plan(spec, isa or instruction_set())
    return Rendered(f"{kernel_name(spec, 'weights')}_{plan.isa}", plan.isa, render_weights(spec, plan))


class CppWeights:
    """A loaded kernel of weights."""

    def __init__(self, spec: AttentionSpec, built: Built) -> None:
        self.source = built.source
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._lse_dtype: torch.dtype = getattr(torch, lse_dtype(spec))
        count = 4 + spec.batch + 2 + len(spec.symbols) + sum(1 + 2 * o.rank for o in spec.operands)
        self._library = Library(built, "weights", count)

    @property
    def runs(self) -> Runs:
        return self._library.runs

    def __call__(self, operands: Sequence[Tensor], lse: Tensor, sizes: Sequence[int], heads: int) -> Tensor:
        """See fuse.targets.protocols.WeightsKernel."""
        out = torch.empty(weights_shape(self._spec, sizes, heads), dtype=self._dtype)
        rows = lse.to(self._lse_dtype).contiguous()  # the reference's, where it stood in for the forward kernel
        strides = [0] * (self._spec.batch + 2)
        arguments = [heads, torch.get_num_threads(), out.data_ptr(), rows.data_ptr(), *strides, *sizes]
        for tensor in operands:
            arguments += [tensor.data_ptr(), *tensor.shape, *tensor.stride()]
        if self._library.call(arguments):
            return out
        return reference.weights(self._spec, operands, sizes, heads, "eager")
