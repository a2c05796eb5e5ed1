"""C++ kernels of gradients: built and called as those of forward are, with the same arguments and more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuse import planner, reference
from fuse.codegen.backward import argument_count, render_backward
from fuse.codegen.sinks import sinks
from fuse.runs import Runs
from fuse.runtime.cpp import Built, Library, build_source, instruction_set
from fuse.runtime.gradients import Gradients
from fuse.spec import AttentionSpec


def build_backward(spec: AttentionSpec, wanted: Sequence[bool], isa: str | None = None) -> Built:
    """The built kernel of the gradients of ``wanted`` operands. Raises BuildFailed, and codegen.sinks.Unsupported."""
    terms = any(s.kind not in ("matrix", "logit") for s in sinks(spec, wanted))
    plan = planner.backward_plan(spec, isa or instruction_set(), terms)
    name = f"attention_backward_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}_{plan.isa}"
    return build_source(name, plan.isa, render_backward(spec, wanted, plan))


class CppBackward:
    """A loaded kernel of gradients."""

    def __init__(self, spec: AttentionSpec, wanted: Sequence[bool], built: Built) -> None:
        self.source = built.source
        found = sinks(spec, wanted)
        self._spec, self._wanted, self._gradients = spec, tuple(wanted), Gradients(spec, found)
        self._lse_dtype: torch.dtype = getattr(torch, planner.lse_dtype(spec, "cpp"))
        count = argument_count(spec) + 1 + spec.batch + 2 + sum(1 + len(s.order) for s in found)
        self._library = Library(built, "backward", count)

    @property
    def runs(self) -> Runs:
        return self._library.runs

    def __call__(
        self, grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        """The gradients of the wanted operands, with the layout that ``torch.empty_like`` gives these."""
        gradients = self._gradients.zeros(operands, sizes)
        lse = lse.to(self._lse_dtype)  # the reference's, where it stood in for the forward kernel
        arguments = [torch.get_num_threads(), out.data_ptr(), lse.data_ptr(), *out.stride(), *sizes]
        for tensor in operands:
            arguments += [tensor.data_ptr(), *tensor.shape, *tensor.stride()]
        for tensor in (grad_out, *gradients.values()):
            arguments += [tensor.data_ptr(), *tensor.stride()]
        if not self._library.call(arguments):
            return reference.attention_backward(self._spec, grad_out, operands, sizes, self._wanted, "eager")
        return self._gradients.totals(operands, self._wanted, gradients)
