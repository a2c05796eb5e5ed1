"""What calls kernels without Python: ``templates/cpp/op.cpp``, built once for a version of torch.

Where it cannot be built or loaded calls go through Python as before, some 15 microseconds later.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fuse.templates
from fuse.ir.spec import AttentionSpec
from fuse.memoize import at_forget
from fuse.targets.cache import BuildFailed, entry
from fuse.targets.cpp import NAME, SUFFIX
from fuse.targets.cpp.compiler import FLAGS, compile_library, cxx_compiler, depends
from fuse.targets.cpp.plan import lse_dtype

log = logging.getLogger(__name__)
_SOURCE = Path(fuse.templates.__path__[0]) / "cpp" / "op.cpp"
_loaded: list[Any] = []  # at most one: what it registers with torch stays for as long as the process does


@dataclass(frozen=True)
class Function:
    """A function of a loaded library, and how many numbers it is given."""

    run: Any
    count: int


@dataclass(frozen=True)
class BackwardCall:
    """Gradients of the ``wanted`` operands in calls of ``sizes``, where each is one tensor.

    destinations  for each, in the order in which the kernel takes them, the operand that it is the gradient of
    """

    wanted: tuple[bool, ...]
    sizes: tuple[int, ...]
    destinations: tuple[int, ...]


def load() -> None:
    """Takes over calls of ``fuse::attention``; while it does, nobody may call it. Never fails."""
    if _loaded:
        return
    folder = Path(torch.__file__).parent
    linked = ("-Wl,--no-as-needed", f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10")
    try:
        command = (*cxx_compiler(), *FLAGS, "-O2", f"-I{folder / 'include'}", *linked)
        versions = f"{depends(command)}\ntorch {torch.__version__}"
        found = entry(NAME, "op", SUFFIX, _SOURCE.read_text(), versions, partial(compile_library, command), _opened)
    except (BuildFailed, OSError) as error:
        log.info("calls of kernels go through Python: %s", error)
        return
    _loaded.append(found.loaded)


def _opened(binary: Path) -> Any:
    """Raises BuildFailed."""
    try:
        library: Any = ctypes.CDLL(str(binary))
        take, take_backward = library.fuse_take, library.fuse_take_backward
    except (OSError, AttributeError) as error:
        raise BuildFailed(str(error)) from error
    number, text, run = ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    numbers = ctypes.POINTER(number)
    take.argtypes = (text, run, number, number, number, numbers, text, text)
    take_backward.argtypes = (text, run, number, *(number, numbers) * 3, text)
    take.restype = take_backward.restype = None
    return library


def take(text: str, spec: AttentionSpec, function: Function) -> None:
    """From now on calls with ``text``, which says ``spec``, are those of ``function``, if ``load`` could do its work."""
    for library in _loaded:
        dtypes = spec.out_dtype.encode(), lse_dtype(spec).encode()
        library.fuse_take(text.encode(), *_pointer(function), spec.batch, spec.v_dim, _numbers(spec.out_order), *dtypes)


def take_backward(text: str, spec: AttentionSpec, function: Function, call: BackwardCall) -> None:
    """As ``take``, where that was called for ``text``, for calls of the backward pass like ``call``."""
    for library in _loaded:
        lists = [x for numbers in (call.wanted, call.sizes, call.destinations) for x in (len(numbers), _numbers(numbers))]
        library.fuse_take_backward(text.encode(), *_pointer(function), *lists, lse_dtype(spec).encode())


def _pointer(of: Function) -> tuple[ctypes.c_void_p, int]:
    return ctypes.cast(of.run, ctypes.c_void_p), of.count


def _numbers(of: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(of))(*of)


@at_forget
def _forget() -> None:
    for library in _loaded:
        library.fuse_forget()
