"""What calls kernels without Python: ``templates/cpp/call.cpp``, ``op.cpp`` and ``caller.cpp``, built once for a version of
torch.

Where it cannot be built or loaded calls go through Python as before, some 15 microseconds later.
"""

from __future__ import annotations

import ctypes
import logging
import sysconfig
from collections.abc import Callable, Sequence
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
from fuse.torch_private import tensor_id

log = logging.getLogger(__name__)
_SOURCES = tuple(Path(fuse.templates.__path__[0]) / "cpp" / name for name in ("call.cpp", "op.cpp", "caller.cpp"))
_STANDARD = "-std=c++20"  # torch 2.14's headers are written in it
_OPERATORS = ("attention", "attention_forward", "attention_backward")
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
    shapes        for each, that of which the kernel writes every element, or ()
    """

    wanted: tuple[bool, ...]
    sizes: tuple[int, ...]
    destinations: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


def torch_command(python: bool = True) -> tuple[str, ...]:
    """How a library that knows torch's tensors is built. Raises BuildFailed."""
    folder = Path(torch.__file__).parent
    included = (f"-I{folder / 'include'}", *([f"-I{sysconfig.get_path('include')}"] if python else []))
    linked = ("-Wl,--no-as-needed", f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10", *(["-ltorch_python"] if python else []))
    return (*cxx_compiler(), *FLAGS, _STANDARD, "-O2", *included, *linked)


def load() -> None:
    """Takes over calls of ``fuse::attention``; while it does, nobody may call it. Never fails."""
    if _loaded:
        return
    try:
        command = torch_command()
    except BuildFailed:  # which every kernel says, too
        return
    try:
        versions = f"{depends(command)}\ntorch {torch.__version__}\n{sysconfig.get_config_var('SOABI')}"
        source = "\n".join(file.read_text() for file in _SOURCES)
        found = entry(NAME, "op", SUFFIX, source, versions, partial(compile_library, command), _opened)
    except (BuildFailed, OSError) as error:
        log.warning("calls of kernels go through Python, some microseconds later: %s", error)
        return
    _loaded.append(found.loaded)


def _opened(binary: Path) -> Any:
    """Raises BuildFailed."""
    try:
        library: Any = ctypes.CDLL(str(binary))
        take, take_backward, caller = library.fuse_take, library.fuse_take_backward, ("fuse_caller", library)
        reads = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.py_object)(("fuse_reads", library))
    except (OSError, AttributeError) as error:
        raise BuildFailed(str(error)) from error
    if reads(known := torch.empty(0, device="cpu")) != tensor_id(known):
        raise BuildFailed("tensors of this torch are laid out in another way")
    number, text, run = ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    numbers = ctypes.POINTER(number)
    take.argtypes = (text, run, number, number, number, numbers, text, text)
    take_backward.argtypes = (text, run, number, *(number, numbers) * 4, text)
    take.restype = take_backward.restype = None
    library.caller = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_int, text, text, ctypes.py_object)(caller)
    return library


def caller(operator: str, text: str, target: str, slow: Callable[..., Any]) -> Callable[..., Any]:
    """See fuse.targets.protocols.Short."""
    for library in _loaded if operator in _OPERATORS else ():
        found: Callable[..., Any] = library.caller(_OPERATORS.index(operator), text.encode(), target.encode(), slow)
        return found
    return slow


def take(text: str, spec: AttentionSpec, function: Function) -> None:
    """From now on calls with ``text``, which says ``spec``, are those of ``function``, if ``load`` could do its work."""
    for library in _loaded:
        dtypes = spec.out_dtype.encode(), lse_dtype(spec).encode()
        library.fuse_take(text.encode(), *_pointer(function), spec.batch, spec.v_dim, _numbers(spec.out_order), *dtypes)


def take_backward(text: str, spec: AttentionSpec, function: Function, call: BackwardCall) -> None:
    """As ``take``, where that was called for ``text``, for calls of the backward pass like ``call``."""
    for library in _loaded:
        shapes = [n for shape in call.shapes for n in (len(shape), *shape)]
        lists = [
            x for numbers in (call.wanted, call.sizes, call.destinations, shapes) for x in (len(numbers), _numbers(numbers))
        ]
        library.fuse_take_backward(text.encode(), *_pointer(function), *lists, lse_dtype(spec).encode())


def _pointer(of: Function) -> tuple[ctypes.c_void_p, int]:
    return ctypes.cast(of.run, ctypes.c_void_p), of.count


def _numbers(of: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(of))(*of)


@at_forget
def _forget() -> None:
    for library in _loaded:
        library.fuse_forget()
