"""Triton's interpreter, mended for what kernels need: bfloat16 products, the functions of libdevice, and bounds of loops.

The interpreter keeps bfloat16 as raw 16-bit words, of which numpy would multiply
the bits; it has no libdevice; that of Triton 3.6 makes integers of arrays with an
axis, which numpy 2.5 refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import target_info
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_product = InterpreterBuilder.create_dot
_patch_tensor = interpreter._patch_lang_tensor


def _as_float32(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _product(self, _as_float32(a), _as_float32(b), *rest)


def _elementwise(function: Callable[..., np.ndarray]) -> Callable[..., tl.tensor]:
    def call(*args: tl.tensor) -> tl.tensor:
        first = args[0]
        data = function(*(np.asarray(getattr(a, "handle", a).data if hasattr(a, "handle") else a) for a in args))
        return tl.tensor(TensorHandle(data.astype(first.handle.data.dtype), first.handle.dtype), first.type)

    return call


def _patch_with_index(tensor: type, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


InterpreterBuilder.create_dot = _dot
interpreter._patch_lang_tensor = _patch_with_index
target_info.current_target = lambda: None  # it runs no instructions of a GPU, though there may be one
for _name, _function in {
    "tanh": np.tanh, "expm1": np.expm1, "log1p": np.log1p, "pow": np.power, "trunc": np.trunc, "rint": np.rint,
}.items():  # fmt: skip
    setattr(libdevice, _name, _elementwise(_function))
