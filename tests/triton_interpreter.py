"""Triton's interpreter, mended for what kernels need: bfloat16 products, the functions of libdevice, and bounds of loops; and
with a guard: what is loaded or stored must lie inside a tensor of the launch.

The interpreter keeps bfloat16 as raw 16-bit words, of which numpy would multiply
the bits; it has no libdevice; that of Triton 3.6 makes integers of arrays with an
axis, which numpy 2.5 refuses. It also patches the language anew for each call
of a function, kernels' helpers included, and looks up a table that it builds for
each dtype: a fifth of the time of these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import target_info
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_product = InterpreterBuilder.create_dot
_patch_tensor, _patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
_convert = interpreter._convert_float
_load, _store, _add = (getattr(InterpreterBuilder, f"create_{x}") for x in ("masked_load", "masked_store", "atomic_rmw"))
_on_host = GridExecutor._init_args_hst


def _as_float32(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _product(self, _as_float32(a), _as_float32(b), *rest)


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """To the nearest bfloat16, as hardware does; the interpreter cuts bits off."""
    if source != tl.float32 or target != tl.bfloat16:
        return np.asarray(_convert(data, source, target, rounding))
    word = np.ascontiguousarray(data).view(np.uint32)
    nearest = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)


def _elementwise(function: Callable[..., np.ndarray]) -> Callable[..., tl.tensor]:
    def call(*args: tl.tensor) -> tl.tensor:
        first = args[0]
        data = function(*(np.asarray(getattr(a, "handle", a).data if hasattr(a, "handle") else a) for a in args))
        return tl.tensor(TensorHandle(data.astype(first.handle.data.dtype), first.handle.dtype), first.type)

    return call


def _patch_with_index(tensor: type, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@cache
def _patched_once() -> SimpleNamespace:
    """Whatever module a function sees the language by; it stays patched, since nothing else uses it in this process."""
    _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    return SimpleNamespace(restore=lambda: None)


_of_any = interpreter._get_np_dtype
_of_number = cache(_of_any)


def _of_scalar(dtype: tl.dtype) -> np.dtype[Any]:
    found: np.dtype[Any] = (_of_any if dtype.is_ptr() else _of_number)(dtype)  # a pointer's cannot be hashed
    return found


class _Guard:
    """The addresses of the tensors of the launch: first and last bytes of disjoint ranges, in their order."""

    def __init__(self) -> None:
        self._first = self._end = np.zeros(0, np.uint64)

    def launch(self, executor: GridExecutor, arguments: Any, options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        positional, named = _on_host(executor, arguments, options)
        tensors = [getattr(x, "base", x) for x in (*positional, *named.values())]  # a descriptor's, or itself
        ranges: list[list[int]] = []
        for first, end in sorted(_span(t) for t in tensors if isinstance(t, torch.Tensor) and t.numel()):
            if ranges and first <= ranges[-1][1]:
                ranges[-1][1] = max(end, ranges[-1][1])
            else:
                ranges.append([first, end])
        self._first, self._end = np.array(ranges, np.uint64).reshape(-1, 2).T
        return positional, named

    def check(self, pointers: TensorHandle, mask: Any) -> None:
        taken = pointers.data[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        found = np.searchsorted(self._first, taken, side="right") - 1
        outside = (found < 0) | (taken + np.uint64(size) > self._end[found])
        assert not outside.any(), f"{outside.sum()} of {taken.size} addresses lie outside of every tensor"


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


_guard = _Guard()


def _guarded_load(self: InterpreterBuilder, ptrs: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any) -> Any:
    _guard.check(ptrs, mask)
    return _load(self, ptrs, mask, *rest, **options)


def _guarded_store(self: InterpreterBuilder, ptrs: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> Any:
    _guard.check(ptrs, mask)
    return _store(self, ptrs, value, mask, *rest)


def _guarded_add(self: InterpreterBuilder, kind: Any, ptr: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> Any:
    _guard.check(ptr, mask)
    return _add(self, kind, ptr, value, mask, *rest)


InterpreterBuilder.create_dot = _dot
interpreter._convert_float = _convert_float
InterpreterBuilder.create_masked_load = _guarded_load
InterpreterBuilder.create_masked_store = _guarded_store
InterpreterBuilder.create_atomic_rmw = _guarded_add
GridExecutor._init_args_hst = lambda self, arguments, options: _guard.launch(self, arguments, options)
interpreter._patch_lang_tensor = _patch_with_index
interpreter._patch_lang = lambda function: _patched_once()
interpreter._get_np_dtype = lambda dtype: _of_scalar(dtype.scalar)
target_info.current_target = lambda: None  # it runs no instructions of a GPU, though there may be one
for _name, _function in {
    "tanh": np.tanh, "expm1": np.expm1, "log1p": np.log1p, "pow": np.power, "trunc": np.trunc, "rint": np.rint,
}.items():  # fmt: skip
    setattr(libdevice, _name, _elementwise(_function))
