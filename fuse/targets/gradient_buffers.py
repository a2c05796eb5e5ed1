"""Memory that kernels write gradients to, and what callers get of it: the same for every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fuse.ir.expr import Apply, Const, Index, Load
from fuse.ir.interval import Leaves, Range, in_call, range_of
from fuse.ir.spec import AttentionSpec
from fuse.kernel.destinations import Destination, overlapping


class GradientBuffers:
    """The gradients of one spec that go to ``destinations``."""

    def __init__(self, spec: AttentionSpec, destinations: Sequence[Destination]) -> None:
        self._spec, self._destinations = spec, tuple(destinations)
        self._real: torch.dtype = getattr(torch, spec.lse_dtype)
        self._shared: dict[tuple[int, ...], dict[str, str]] = {}
        self._apart_in: dict[tuple[int, ...], bool] = {}
        self._whole_in: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}

    def are_apart(self, sizes: Sequence[int]) -> bool:
        """Whether in this call no two batch indices share a part of a gradient: else no kernel computes it."""
        key = tuple(sizes)
        if key not in self._apart_in:
            by_name = dict(zip(self._spec.symbols, sizes, strict=True))
            self._apart_in = {key: not overlapping(self._destinations, self._spec, by_name)}
        return self._apart_in[key]

    def whole(self, sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The destinations that may write each element of an operand, and the shape of one of which they do."""
        key = tuple(sizes)
        if key not in self._whole_in:
            leaves = self._leaves(dict(zip(self._spec.symbols, sizes, strict=True)))
            matrices = [to for to in self._destinations if to.kind == "matrix" and 0 not in sizes]  # else no kernel runs
            found = {to.name: _shape_written(to.load, leaves) for to in matrices}
            self._whole_in = {key: {name: shape for name, shape in found.items() if shape is not None}}
        return self._whole_in[key]

    def made(
        self, operands: Sequence[Tensor], sizes: Sequence[int], written: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """A tensor of zeros for every destination, by name; one tensor for those that write to different places of an operand.

        written  ``whole``, where the kernel writes all that it can: what has such a shape is not filled
        """
        key = tuple(sizes)
        if key not in self._shared:
            self._shared = {key: self._first_of(dict(zip(self._spec.symbols, sizes, strict=True)))}
        found: dict[str, Tensor] = {}
        for to in self._destinations:
            operand, first = operands[to.load.operand], self._shared[key][to.name]
            if first in found:
                found[to.name] = found[first]
            elif to.kind == "matrix":
                filled = written.get(to.name) != tuple(operand.shape)
                found[to.name] = (torch.zeros_like if filled else torch.empty_like)(operand)
            else:
                outer_first = [operand.shape[d] for d in to.order]
                memory = torch.zeros(outer_first, dtype=self._real, device=operand.device)
                found[to.name] = memory.permute(_inverse(to.order))
        return found

    def of_operands(self, sizes: Sequence[int]) -> tuple[int, ...] | None:
        """The operand of each destination where every gradient is one tensor, the operand's like; None where one is a sum."""
        shared = self._first_of(dict(zip(self._spec.symbols, sizes, strict=True)))
        firsts = {(to.load.operand, shared[to.name]) for to in self._destinations}
        operands = tuple(to.load.operand for to in self._destinations)
        whole = len(firsts) == len(set(operands)) and all(to.kind == "matrix" for to in self._destinations)
        return operands if whole else None

    def totals(self, operands: Sequence[Tensor], wanted: Sequence[bool], found: Mapping[str, Tensor]) -> list[Tensor]:
        """The gradients of the wanted operands, with the layout that ``torch.empty_like`` gives these."""
        return [_total(t, self._of(i, found)) for i, t in enumerate(operands) if wanted[i]]

    def _of(self, operand: int, found: Mapping[str, Tensor]) -> list[Tensor]:
        """What was summed for one operand, each tensor once."""
        return list({id(g): g for s in self._destinations if s.load.operand == operand for g in (found[s.name],)}.values())

    def _first_of(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """For each destination, the first that it shares a tensor with."""
        groups: dict[str, list[Destination]] = {}
        for to in self._destinations:
            fits = (n for n, g in groups.items() if to.kind == "matrix" and all(self._apart(to, s, sizes) for s in g))
            groups.setdefault(next(fits, to.name), []).append(to)
        return {s.name: name for name, group in groups.items() for s in group}

    def _apart(self, a: Destination, b: Destination, sizes: Mapping[str, int]) -> bool:
        """Whether two destinations write to different places of the same operand."""
        if a.load.operand != b.load.operand or b.kind != "matrix":
            return False
        leaves = self._leaves(sizes)

        def ranges(load: Load) -> list[Range]:
            return [range_of(c, leaves) for c in load.coords]

        pairs = zip(ranges(a.load), ranges(b.load), strict=True)
        return any(x.high < y.low or y.high < x.low for x, y in pairs)

    def _leaves(self, sizes: Mapping[str, int]) -> Leaves:
        return in_call(sizes, {"d": self._spec.qk_dim, "e": self._spec.v_dim})


def _shape_written(load: Load, leaves: Leaves) -> tuple[int, ...] | None:
    """The shape of which ``load`` reads each element: an index along each dimension, or one for so many of a batch."""
    axes: list[str] = []
    for coord in load.coords:
        divided = isinstance(coord, Apply) and coord.op == "floordiv" and isinstance(coord.operands[1], Const)
        of = coord.operands[0] if isinstance(coord, Apply) and divided else coord
        if not isinstance(of, Index):
            return None
        axes.append(of.axis)
    distinct = len(axes) == len(set(axes))
    return tuple(int(range_of(coord, leaves).high) + 1 for coord in load.coords) if distinct else None


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _total(operand: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Their sum, in the dtype and layout of ``operand``'s gradient."""
    if len(parts) == 1 and parts[0].dtype == operand.dtype and parts[0].stride() == torch.empty_like(operand).stride():
        return parts[0]
    total = sum((p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts[1:]), parts[0])
    return torch.empty_like(operand).copy_(total)
