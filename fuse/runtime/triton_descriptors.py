"""Tensor descriptors of a call's operands, where they have the layout for it and the call is worth the time that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fuse.descriptors import Rows, rows_of
from fuse.expr import Load
from fuse.planner_triton import widened

# Entries of the scores of a call from which on it takes a GPU longer than descriptors take the host.
WORTH = 2**24
_BYTES = 16  # that addresses and strides are multiples of (CUDA driver API, cuTensorMapEncodeTiled)


@dataclass(frozen=True)
class Matrices:
    """What tiles of ``block`` rows are copied of: ``length`` rows of ``features``; beyond are zeros."""

    tensor: Tensor
    rows: Rows
    length: int
    features: int
    block: int

    def described(self) -> TensorDescriptor | None:
        """None where the layout does not allow it."""
        tensor, dims = self.tensor, self.rows.dims
        shape = [*(tensor.shape[dim] for dim in self.rows.places), self.length, self.features]
        unit = _BYTES // tensor.element_size()
        strides = [tensor.stride(dim) if n > 1 else unit for dim, n in zip(dims[:-1], shape, strict=False)]
        if tensor.stride(dims[-1]) != 1 or tensor.data_ptr() % _BYTES or any(n <= 0 or n % unit for n in strides):
            return None
        block = [*[1] * len(self.rows.places), self.block, widened(self.features)]
        return TensorDescriptor(tensor, shape, [*strides, 1], block)


def matrices(operands: Sequence[Tensor], load: Load, length: int, features: int, block: int) -> Matrices:
    """Those of query, key or value, which is ``describable``."""
    rows = rows_of(load)
    assert rows is not None
    return Matrices(operands[load.operand], rows, length, features, block)


def copied(matrices: Sequence[Matrices], entries: int, filler: Tensor) -> tuple[tuple[Any, ...], bool]:
    """The descriptors of all ``matrices``, or of none: then any tensor in their places, and False.

    entries  of the scores of the call
    """
    found = [made for x in matrices if (made := x.described()) is not None] if entries >= WORTH else []
    return (tuple(found), True) if len(found) == len(matrices) else ((filler,) * len(matrices), False)
