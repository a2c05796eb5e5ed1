"""C++ kernels of gradients: built and called as those of forward are, with the same arguments and more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.kernel.destinations import destinations
from fuse.kernel.names import kernel_name
from fuse.report.runs import Runs
from fuse.targets import reference
from fuse.targets.cpp import op
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import Built, Library, Rendered, build_source
from fuse.targets.cpp.plan import backward_plan, lse_dtype
from fuse.targets.cpp.render_backward import argument_count, render_backward
from fuse.targets.fallback_warnings import OVERLAPPING, left_to_reference
from fuse.targets.gradient_buffers import GradientBuffers

_SIZES = 8  # that are called without Python: who trains on many has other costs


def build_backward(spec: AttentionSpec, wanted: Sequence[bool], isa: str | None = None) -> Built:
    """The built kernel of the gradients of ``wanted`` operands. Raises BuildFailed, and Unsupported."""
    return build_source(*rendered_backward(spec, wanted, isa))


def rendered_backward(spec: AttentionSpec, wanted: Sequence[bool], isa: str | None = None) -> Rendered:
    """Raises Unsupported."""
    terms = any(s.kind not in ("matrix", "logit") for s in destinations(spec, wanted))
    plan = backward_plan(spec, isa or instruction_set(), terms)
    return Rendered(f"{kernel_name(spec, 'backward')}_{plan.isa}", plan.isa, render_backward(spec, wanted, plan))


class CppBackward:
    """A loaded kernel of gradients."""

    def __init__(self, spec: AttentionSpec, wanted: Sequence[bool], built: Built) -> None:
        self.source = built.source
        found = destinations(spec, wanted)
        self._spec, self._wanted, self._gradients = spec, tuple(wanted), GradientBuffers(spec, found)
        self._lse_dtype: torch.dtype = getattr(torch, lse_dtype(spec))
        count = argument_count(spec) + 2 + spec.batch + 2 + sum(1 + len(s.order) for s in found)
        self._library = Library(built, "backward", count)
        self._names = [to.name for to in found]
        self._text = ""
        self._told: set[tuple[int, ...]] = set()

    @property
    def runs(self) -> Runs:
        return self._library.runs

    def known_as(self, text: str) -> None:
        """Of the spec that is written ``text``: from the next call on, in the first sizes that there are."""
        self._text, self._told = text, set()

    def _tell(self, sizes: Sequence[int]) -> None:
        key = tuple(sizes)
        if not self._text or key in self._told or len(self._told) == _SIZES or not self._gradients.are_apart(sizes):
            return
        self._told.add(key)
        if (operands := self._gradients.of_operands(sizes)) is not None:
            found = op.BackwardCall(
                self._wanted, key, operands, tuple(self._gradients.whole(sizes).get(n, ()) for n in self._names)
            )
            op.take_backward(self._text, self._spec, self._library.function, found)

    def __call__(
        self, grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor,
        grad_lse: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients of the wanted operands, with the layout that ``torch.empty_like`` gives these."""
        self._tell(sizes)
        if not self._gradients.are_apart(sizes):
            self._library.runs = left_to_reference(self.runs, "backward", OVERLAPPING)
            return reference.attention_backward(self._spec, grad_out, operands, sizes, self._wanted, "eager", grad_lse)
        gradients = self._gradients.made(operands, sizes, self._gradients.whole(sizes))
        lse = lse.to(self._lse_dtype)  # the reference's, where it stood in for the forward kernel
        arguments = [torch.get_num_threads(), out.data_ptr(), lse.data_ptr(), *out.stride(), *sizes]
        for tensor in operands:
            arguments += [tensor.data_ptr(), *tensor.shape, *tensor.stride()]
        of_lse = None if grad_lse is None else grad_lse.to(self._lse_dtype)
        arguments.append(0 if of_lse is None else of_lse.data_ptr())
        for tensor in (grad_out, *gradients.values()):
            arguments += [tensor.data_ptr(), *tensor.stride()]
        if not self._library.call(arguments):
            return reference.attention_backward(self._spec, grad_out, operands, sizes, self._wanted, "eager", grad_lse)
        return self._gradients.totals(operands, self._wanted, gradients)
