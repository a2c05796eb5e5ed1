"""Tiles that hardware can copy by itself, from the shape and strides of the tensor that they lie in: a kernel then computes
neither addresses nor conditions (CUDA C++ Programming Guide, tensor memory access).
"""

from __future__ import annotations

from dataclasses import dataclass

from fuse import expr
from fuse.expr import Index, Load
from fuse.spec import AttentionSpec

# Dimensions that a descriptor may have.
_MOST = 5


@dataclass(frozen=True)
class Rows:
    """A tile is a rectangle of its tensor.

    dims  the tensor's dimensions: those in which it is at one place, that of its rows, and that of their features
    """

    dims: tuple[int, ...]

    @property
    def places(self) -> tuple[int, ...]:
        return self.dims[:-2]


def rows_of(load: Load) -> Rows | None:
    """How the tiles of ``load`` lie in its operand; None where they are no rectangles of it."""
    at = {c.axis: dim for dim, c in enumerate(load.coords) if isinstance(c, Index)}
    inner = [dim for dim, c in enumerate(load.coords) if expr.axes(c) & {"q", "k", "d", "e"}]
    row, feature = (next((at[axis] for axis in axes if axis in at), None) for axes in ("qk", "de"))
    if row is None or feature is None or sorted(inner) != sorted((row, feature)) or len(load.coords) > _MOST:
        return None
    return Rows((*(dim for dim in range(len(load.coords)) if dim not in inner), row, feature))


def describable(spec: AttentionSpec) -> bool:
    """Whether tiles of query, key and value are rectangles, and of the 16 bits that matrix units take from shared memory."""
    loads = (spec.query, spec.key, spec.value)
    dtypes = {spec.out_dtype, *(load.dtype for load in loads)}
    return len(dtypes) == 1 and dtypes <= {"bfloat16", "float16"} and all(rows_of(load) is not None for load in loads)
