"""C++ kernels of gradients: built and called as those of forward are, with the same arguments and more."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fuse import planner, reference
from fuse.codegen import render
from fuse.codegen.backward import Sink, argument_count, render_backward, sinks
from fuse.codegen.cpp import Interval, interval
from fuse.expr import Expr, Index, Load, Symbol
from fuse.runtime.cache import Entry
from fuse.runtime.cpp import build_source, instruction_set
from fuse.spec import AttentionSpec


def build_backward(spec: AttentionSpec, wanted: Sequence[bool], isa: str | None = None) -> Entry:
    """The built kernel of the gradients of ``wanted`` operands. Raises BuildFailed, and codegen.backward.Unsupported."""
    terms = any(s.kind not in ("matrix", "logit") for s in sinks(spec, wanted))
    plan = planner.backward_plan(spec, isa or instruction_set(), terms)
    name = f"attention_backward_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}_{plan.isa}"
    return build_source(name, plan.isa, render_backward(spec, wanted, plan))


class CppBackward:
    """A loaded kernel of gradients."""

    def __init__(self, spec: AttentionSpec, wanted: Sequence[bool], built: Entry) -> None:
        self.source = built.source
        self._spec, self._wanted, self._sinks = spec, tuple(wanted), sinks(spec, wanted)
        self._real: torch.dtype = getattr(torch, spec.lse_dtype)
        self._run = getattr(ctypes.CDLL(str(built.binary)), render.ENTRY)
        self._run.argtypes, self._run.restype = (ctypes.c_char_p,), ctypes.c_int
        count = argument_count(spec) + 1 + spec.batch + 2 + sum(1 + len(s.order) for s in self._sinks)
        self._pack = struct.Struct(f"{count}q").pack
        self._shared: dict[tuple[int, ...], dict[str, str]] = {}

    def __call__(
        self, grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        """The gradients of the wanted operands, with the layout that ``torch.empty_like`` gives these."""
        gradients = self._gradients(operands, sizes)
        arguments = [torch.get_num_threads(), out.data_ptr(), lse.data_ptr(), *out.stride(), *sizes]
        for tensor in operands:
            arguments += [tensor.data_ptr(), *tensor.shape, *tensor.stride()]
        for tensor in (grad_out, *gradients.values()):
            arguments += [tensor.data_ptr(), *tensor.stride()]
        code = self._run(self._pack(*arguments))
        if code > 1:
            raise RuntimeError({2: "out of memory"}.get(code, f"kernel error {code}"))
        if code:
            return reference.attention_backward(self._spec, grad_out, operands, sizes, self._wanted, "eager")
        return [_total(t, self._of(i, gradients)) for i, t in enumerate(operands) if self._wanted[i]]

    def _of(self, operand: int, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """What was summed for one operand, each tensor once."""
        return list({id(g): g for s in self._sinks if s.load.operand == operand for g in (gradients[s.name],)}.values())

    def _gradients(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
        """Zeros for every sink, by name; one tensor for those that write to different places of an operand."""
        key = tuple(sizes)
        if key not in self._shared:
            self._shared = {key: self._first_of(dict(zip(self._spec.symbols, sizes, strict=True)))}
        found: dict[str, Tensor] = {}
        for sink in self._sinks:
            operand, first = operands[sink.load.operand], self._shared[key][sink.name]
            if first in found:
                found[sink.name] = found[first]
            elif sink.kind == "matrix":
                found[sink.name] = torch.zeros_like(operand)
            else:
                outer_first = [operand.shape[d] for d in sink.order]
                found[sink.name] = torch.zeros(outer_first, dtype=self._real).permute(_inverse(sink.order))
        return found

    def _first_of(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """For each sink, the first that it shares a tensor with."""
        groups: dict[str, list[Sink]] = {}
        for sink in self._sinks:
            fits = (n for n, g in groups.items() if sink.kind == "matrix" and all(self._apart(sink, s, sizes) for s in g))
            groups.setdefault(next(fits, sink.name), []).append(sink)
        return {s.name: name for name, group in groups.items() for s in group}

    def _apart(self, a: Sink, b: Sink, sizes: Mapping[str, int]) -> bool:
        """Whether two sinks write to different places of the same operand."""
        if a.load.operand != b.load.operand or b.kind != "matrix":
            return False
        extents = {"q": sizes["q_len"], "k": sizes["kv_len"], "d": self._spec.qk_dim, "e": self._spec.v_dim}
        extents |= {f"b{i}": sizes[f"B{i}"] for i in range(self._spec.batch)}

        def leaves(leaf: Expr) -> Interval:
            if isinstance(leaf, Symbol):
                return (sizes[leaf.name], sizes[leaf.name])
            return (0, extents[leaf.axis] - 1) if isinstance(leaf, Index) else None

        def ranges(load: Load) -> list[Interval]:
            return [interval(c, leaves) for c in load.coords]

        pairs = zip(ranges(a.load), ranges(b.load), strict=True)
        return any(x is not None and y is not None and (x[1] < y[0] or y[1] < x[0]) for x, y in pairs)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _total(operand: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Their sum, in the dtype and layout of ``operand``'s gradient."""
    if len(parts) == 1 and parts[0].dtype == operand.dtype and parts[0].stride() == torch.empty_like(operand).stride():
        return parts[0]
    total = sum((p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts[1:]), parts[0])
    return torch.empty_like(operand).copy_(total)
