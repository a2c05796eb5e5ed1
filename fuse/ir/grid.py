"""Expressions evaluated by PyTorch on a grid of indices: with numbers, or with fake tensors to record the computation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuse.ir.expr import FLOATS, Apply, Const, Expr, Index, Load, Symbol, walk
from fuse.ir.operators import OPERATORS
from fuse.ir.roundings import decides
from fuse.ir.spec import IntLike, InvalidSpec

Extent = tuple[IntLike, IntLike]


@dataclass(frozen=True)
class Grid:
    """A grid of indices, one dimension each, on which expressions are evaluated.

    indices   by axis, each of the grid's rank and of size 1 along every dimension but its own
    symbols   the values of sizes, by name
    operands  the tensors behind Load
    exact     floats are float64, whatever their dtype, but for what decides something (fuse.ir.roundings); else each node has
              its own dtype, as in eager PyTorch
    """

    indices: Mapping[str, Tensor]
    symbols: Mapping[str, IntLike]
    operands: Sequence[Tensor]
    exact: bool
    device: torch.device

    @staticmethod
    def over(
        extents: Mapping[str, Extent], symbols: Mapping[str, IntLike], operands: Sequence[Tensor] = (), exact: bool = False
    ) -> Grid:
        """The grid of axes that run over ``extents``, in their order, on the device of the operands."""
        device = operands[0].device if operands else torch.device("cpu")
        indices = {
            axis: torch.arange(*extent, device=device).reshape([-1 if i == dim else 1 for i in range(len(extents))])
            for dim, (axis, extent) in enumerate(extents.items())
        }
        return Grid(indices, symbols, operands, exact, device)

    def evaluate(self, root: Expr, given: Mapping[Expr, Tensor] | None = None) -> Tensor:
        """The value of ``root``, of size 1 along the dimensions that it does not depend on; ``given`` are known values."""
        given = given or {}
        values = dict(given)
        for node in walk(root):
            if node not in values:
                decided = self.exact and decides(node)
                values[node] = self._decided(node, given) if decided else self._node(node, [values[a] for a in node.args])
        value = values[root].to(dtype_of(root.dtype, self.exact))
        return value if value.dim() else self._scalar(value)

    def scatter(self, grad: Tensor, load: Load, total: Tensor) -> None:
        """Adds ``grad``, over the grid, to ``total`` at the coordinates of ``load``."""
        coords = [self.evaluate(c, {}).clamp(0, n - 1) for c, n in zip(load.coords, total.shape, strict=True)]
        grad = grad.sum_to_size(torch.broadcast_shapes([1] * grad.dim(), *(c.shape for c in coords))).to(total.dtype)
        if not coords:
            total.add_(grad.reshape(()))
        elif total.numel():
            total.index_put_(tuple(coords), grad, accumulate=True)

    def _decided(self, node: Expr, given: Mapping[Expr, Tensor]) -> Tensor:
        """As eager decides it, with all the roundings below."""
        as_eager = {n: x.to(dtype_of(n.dtype)) for n, x in given.items()}
        return replace(self, exact=False).evaluate(node, as_eager).to(dtype_of(node.dtype, self.exact))

    def _node(self, node: Expr, args: list[Tensor]) -> Tensor:
        if isinstance(node, Const):
            return self._constant(node)
        if isinstance(node, Symbol):
            return self._scalar(torch.full((), self.symbols[node.name], device=self.device))
        if isinstance(node, Index):
            return self.indices[node.axis]
        if isinstance(node, Load):
            return self._load(self.operands[node.operand], args).to(dtype_of(node.dtype, self.exact))
        if not isinstance(node, Apply):
            raise InvalidSpec(f"{node} is not in scope")
        value = (args[0] if node.op == "cast" else OPERATORS[node.op].function(*args)).to(dtype_of(node.dtype, self.exact))
        return _overflow(value, node.dtype) if self.exact and node.dtype in FLOATS else value

    def _constant(self, node: Const) -> Tensor:
        """Of no dimensions and in float64: like a Python number, it is not rounded to the dtype of what it meets."""
        return torch.tensor(node.value, dtype=torch.float64 if node.dtype in FLOATS else dtype_of(node.dtype))

    def _scalar(self, value: Tensor) -> Tensor:
        return value.reshape((1,) * len(self.indices))

    def _load(self, tensor: Tensor, coords: list[Tensor]) -> Tensor:
        """Coordinates are clamped: what lies outside is read only for entries that a ``where`` does not choose."""
        if not coords:
            return self._scalar(tensor)
        if tensor.numel() == 0:
            return torch.zeros_like(math.prod(coords, start=coords[0]), dtype=tensor.dtype)
        return tensor[tuple(c.clamp(0, size - 1) for c, size in zip(coords, tensor.shape, strict=True))]


def dtype_of(name: str, exact: bool = False) -> torch.dtype:
    """torch's dtype of a dtype's name; float64 for every float where ``exact``."""
    dtype: torch.dtype = torch.float64 if exact and name in FLOATS else getattr(torch, name)
    return dtype


def _overflow(value: Tensor, name: str) -> Tensor:
    """float64 values, infinite where rounding to dtype ``name`` makes them so."""
    limits = torch.finfo(dtype_of(name))
    largest = limits.max * (1 + limits.eps / 4)  # halfway to the number that would follow
    return value.masked_fill(value > largest, math.inf).masked_fill(value < -largest, -math.inf)
