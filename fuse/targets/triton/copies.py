"""Tensor descriptors of a call's operands, where they have the layout for it and the call is worth the time that they take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fuse.ir.expr import Load
from fuse.ir.spec import AttentionSpec
from fuse.kernel.rectangles import rows_of
from fuse.targets.triton.plan import TritonPlan, widened
from fuse.targets.triton.plan_backward import Launch

# Entries of the scores of a call from which on it takes a GPU longer than descriptors take the host.
WORTH = 2**24
_BYTES = 16  # that addresses and strides are multiples of (CUDA driver API, cuTensorMapEncodeTiled)


class Copies:
    """What a kernel takes that may copy tiles of some matrices by tensor descriptors.

    names     of "query", "key" and "value"
    rendered  whether the kernel may; else it takes nothing
    """

    def __init__(self, spec: AttentionSpec, names: Sequence[str], rendered: bool) -> None:
        self._spec, self._rendered = spec, rendered
        self._loads: dict[str, Load] = {name: getattr(spec, name) for name in names}

    def of(
        self, operands: Sequence[Any], sizes: Sequence[int], plan: TritonPlan | Launch, planned: bool
    ) -> tuple[dict[str, Any], bool]:
        """Descriptors or, unless they are ``planned`` and possible for all of them, tensors; and which it is."""
        if not self._rendered:
            return {}, False
        spec, found = self._spec, []
        tensors = [operands[load.operand] for load in self._loads.values()]
        *batch, q_len, kv_len = sizes[: spec.batch + 2]
        if planned and math.prod((*batch, q_len, kv_len)) >= WORTH:
            for (name, load), tensor in zip(self._loads.items(), tensors, strict=True):
                length, block = (q_len, plan.block_q) if name == "query" else (kv_len, plan.block_k)
                found.append(descriptor(tensor, load, length, spec.v_dim if name == "value" else spec.qk_dim, block))
        described = bool(found) and None not in found
        names = (f"{name}_rows" for name in self._loads)
        return dict(zip(names, found if described else tensors, strict=True)), described


def descriptor(tensor: Tensor, load: Load, length: int, features: int, block: int) -> TensorDescriptor | None:
    """Of tiles of ``block`` rows, of which there are ``length``; beyond are zeros. None where the layout does not allow it."""
    rows = rows_of(load)
    if rows is None:
        return None
    dims = rows.dims
    width = features if rows.apart else tensor.shape[dims[-1]]
    shape = [*(tensor.shape[dim] for dim in rows.places), length, width]
    unit = _BYTES // tensor.element_size()
    strides = [tensor.stride(dim) if n > 1 else unit for dim, n in zip(dims[:-1], shape, strict=False)]
    if tensor.stride(dims[-1]) != 1 or tensor.data_ptr() % _BYTES or any(n <= 0 or n % unit for n in strides):
        return None
    return TensorDescriptor(tensor, shape, [*strides, 1], [*[1] * len(rows.places), block, widened(features)])
