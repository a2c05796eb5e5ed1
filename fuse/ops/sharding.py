"""The ops on DTensors: parts of the batch and of the heads stay where they are, each rank computes its own.

A dimension of a mesh divides the batch index by which the most elements lie divided already, if the spec says that parts of it
are calls by themselves (fuse.ir.divided); an operand that does not count that index is needed whole, and its gradient is what
all ranks find for it together. Where there is no such index, every rank of that dimension has all operands and computes the
same. ``register_sharding`` of torch cannot say this: ``sizes`` are those of the whole, and a rank needs those of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fuse.ir.divided import Counted, counted
from fuse.ir.spec import AttentionSpec, IntLike
from fuse.ops.attention import parsed

Placements = tuple[Placement, ...]
_library: Any = torch.library.Library("fuse", "FRAGMENT")


@dataclass(frozen=True)
class _Division:
    """``by``: for each dimension of the mesh which batch index it divides; None: none."""

    spec: AttentionSpec
    mesh: DeviceMesh
    by: tuple[int | None, ...]

    def part(self, sizes: Sequence[IntLike]) -> list[IntLike]:
        """Those of a rank's call."""
        own = list(sizes)
        for dim, number in enumerate(self.by):
            if number is not None:
                own[number] //= self.mesh.size(dim)
        return own

    def of_rows(self) -> Placements:
        """How a result lies, or the log-sum-exp of its rows, which count batch indices by their first dimensions."""
        return tuple(_placed(number) for number in self.by)

    def of_operand(self, i: int) -> Placements:
        return tuple(_placed(_dim(self.spec, i, number)) for number in self.by)

    def of_gradient(self, i: int) -> Placements:
        at = ((number, _dim(self.spec, i, number)) for number in self.by)
        return tuple(Partial() if dim is None and number is not None else _placed(dim) for number, dim in at)

    def local(self, x: Tensor, placements: Placements) -> Tensor:
        """A rank's part. Of a plain tensor every rank has the whole: DTensors meet no others.

        Detached, else torch would do it to the result, in place, which 2.11 has no rule for.
        """
        if not isinstance(x, DTensor):
            return x
        detached: Any = x.detach()
        part: Tensor = detached.redistribute(self.mesh, placements).to_local()
        return part

    def operands(self, operands: Sequence[Tensor]) -> list[Tensor]:
        return [self.local(x, self.of_operand(i)) for i, x in enumerate(operands)]

    def whole(self, part: Tensor, placements: Placements, shape: Sequence[IntLike], strides: Sequence[IntLike]) -> DTensor:
        return DTensor.from_local(part, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))

    def gradient(self, i: int, part: Tensor, of: Tensor) -> Tensor:
        """Of the whole of operand ``i``, which is ``of``; plain where that is."""
        like = torch.empty_like(torch.empty_strided(of.shape, of.stride(), device="meta"))
        found = self.whole(part, self.of_gradient(i), of.shape, like.stride())
        return found if isinstance(of, DTensor) else found.full_tensor()


def _placed(dim: int | None) -> Placement:
    return Replicate() if dim is None else Shard(dim)


def _dim(spec: AttentionSpec, operand: int, number: int | None) -> int | None:
    """The dimension in which an operand counts a batch index that is divided."""
    way = None if number is None else _ways(spec, number).get(operand)
    return None if way is None else way.dim


def _ways(spec: AttentionSpec, number: int) -> Mapping[int, Counted]:
    return counted(spec, number) or {}


def _division(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[IntLike]) -> _Division:
    mesh = next(x for x in operands if isinstance(x, DTensor)).device_mesh
    parts: list[IntLike] = [1] * spec.batch
    by: list[int | None] = []
    for dim in range(mesh.ndim):
        count = mesh.size(dim)
        found = [n for n in range(spec.batch) if _can(spec, n, operands, sizes[n], parts[n] * count)]
        lying = {n: _lying(spec, n, operands, dim) for n in found}
        best = max(found, key=lying.__getitem__, default=None)
        by.append(best if best is not None and lying[best] else None)
        if by[-1] is not None:
            parts[by[-1]] *= count
    return _Division(spec, mesh, tuple(by))


def _can(spec: AttentionSpec, number: int, operands: Sequence[Tensor], count: IntLike, parts: IntLike) -> bool:
    ways = counted(spec, number)
    return ways is not None and all(way.fits(operands[i].shape[way.dim], count, parts) for i, way in ways.items())


def _lying(spec: AttentionSpec, number: int, operands: Sequence[Tensor], dim: int) -> IntLike:
    """How many elements of operands a dimension of the mesh divides by batch index ``number``."""
    at = ((operands[i], way.dim) for i, way in _ways(spec, number).items())
    return sum(x.numel() for x, d in at if isinstance(x, DTensor) and x.placements[dim] == Shard(d))


# ------------------------------------------------------------------------------------------------------------------ rules


def _forward(op: Any, operands: list[Tensor], sizes: list[IntLike], text: str, target: str) -> Any:
    """Of all ops that give the result, and perhaps something of its rows."""
    spec = parsed(text)
    division = _division(spec, operands, sizes)
    found = op(division.operands(operands), division.part(sizes), text, target)
    results = (found,) if isinstance(found, Tensor) else found
    lse = spec.lse_shape(sizes)
    memory = [(spec.out_shape(sizes), spec.out_strides(sizes)), *[(lse, _dense(lse))] * (len(results) - 1)]
    whole = tuple(division.whole(x, division.of_rows(), *m) for x, m in zip(results, memory, strict=True))
    return whole[0] if isinstance(found, Tensor) else whole


def _backward(
    op: Any, grad_out: Tensor, operands: list[Tensor], sizes: list[IntLike], out: Tensor, lse: Tensor, text: str, target: str,
    wanted: list[bool], grad_lse: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    division = _division(parsed(text), operands, sizes)
    rows = [None if x is None else division.local(x, division.of_rows()) for x in (grad_out, out, lse, grad_lse)]
    given, part = division.operands(operands), division.part(sizes)
    found = iter(op(rows[0], given, part, rows[1], rows[2], text, target, wanted, rows[3]))
    return [division.gradient(i, next(found), operands[i]) for i, w in enumerate(wanted) if w]


def _dense(shape: Sequence[IntLike]) -> tuple[IntLike, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _rule(compute: Callable[..., Any]) -> Callable[..., Any]:
    def rule(cls: type, op: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        with torch.no_grad():  # autograd is above
            return compute(op, *args, **(kwargs or {}))

    return rule


for _name in ("attention", "attention_lse", "attention_rows", "attention_forward"):
    torch.library.register_torch_dispatch(f"fuse::{_name}", DTensor, _rule(_forward), lib=_library)
torch.library.register_torch_dispatch("fuse::attention_backward", DTensor, _rule(_backward), lib=_library)
