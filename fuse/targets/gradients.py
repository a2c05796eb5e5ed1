"""Memory that kernels write gradients to, and what callers get of it: the same for every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fuse.ir.expr import Load
from fuse.ir.interval import Range, bounds, in_call
from fuse.ir.spec import AttentionSpec
from fuse.kernel.sinks import Sink


class Gradients:
    """The gradients of one spec that go to ``sinks``."""

    def __init__(self, spec: AttentionSpec, sinks: Sequence[Sink]) -> None:
        self._spec, self._sinks = spec, tuple(sinks)
        self._real: torch.dtype = getattr(torch, spec.lse_dtype)
        self._shared: dict[tuple[int, ...], dict[str, str]] = {}

    def zeros(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
        """A tensor for every sink, by name; one tensor for those that write to different places of an operand."""
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
                memory = torch.zeros(outer_first, dtype=self._real, device=operand.device)
                found[sink.name] = memory.permute(_inverse(sink.order))
        return found

    def totals(self, operands: Sequence[Tensor], wanted: Sequence[bool], found: Mapping[str, Tensor]) -> list[Tensor]:
        """The gradients of the wanted operands, with the layout that ``torch.empty_like`` gives these."""
        return [_total(t, self._of(i, found)) for i, t in enumerate(operands) if wanted[i]]

    def _of(self, operand: int, found: Mapping[str, Tensor]) -> list[Tensor]:
        """What was summed for one operand, each tensor once."""
        return list({id(g): g for s in self._sinks if s.load.operand == operand for g in (found[s.name],)}.values())

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
        leaves = in_call(sizes, {"d": self._spec.qk_dim, "e": self._spec.v_dim})

        def ranges(load: Load) -> list[Range]:
            return [bounds(c, leaves) for c in load.coords]

        pairs = zip(ranges(a.load), ranges(b.load), strict=True)
        return any(x.high < y.low or y.high < x.low for x, y in pairs)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _total(operand: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Their sum, in the dtype and layout of ``operand``'s gradient."""
    if len(parts) == 1 and parts[0].dtype == operand.dtype and parts[0].stride() == torch.empty_like(operand).stride():
        return parts[0]
    total = sum((p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts[1:]), parts[0])
    return torch.empty_like(operand).copy_(total)
