"""Launches of Triton functions: with the arguments that they have, on the operands' device and the current stream, and without
taking arguments apart twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver
from triton.runtime.errors import OutOfResources

from fuse.targets.cache import BuildFailed


class CannotCompile(RuntimeError):
    """Triton failed at a kernel; the message says how."""


class Spilled(RuntimeError):
    """A kernel was compiled whose threads keep ``count`` words in memory for want of registers: launched again, it runs."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} registers are spilled")
        self.count = count


# What keeps a kernel from being launched, whatever its operands hold.
REFUSALS = (CannotCompile, OutOfResources, BuildFailed)
# A product and a sum become one instruction: Triton 3.9 warns where nobody says whether, later ones will not do it unasked.
_FUSION = {"enable_fp_fusion": True}
_OPTIONS = ("num_warps", "num_stages")
_MOST = 1024  # compiled specialisations that are remembered, in which sizes are counted one by one


class Function:
    """A Triton function, launched as ``function[grid](arguments, **constants)``: it takes what it has a name for. Arguments are
    tensors, of which one comes first, integers, and tensor descriptors; constants are those of the function, and _OPTIONS.

    Triton finds the kernel that it compiled by taking every argument apart. Here what it found is kept by the arguments'
    integers and the alignment of the tensors, which is all that it depends on: dtypes belong to the function, and the shapes
    of tiles to its constants. On AMD it also depends on the sizes of tensors, and Triton's own way is taken.

    replans  the first launch of a kernel that spills raises Spilled: whoever launches may have another plan
    """

    def __init__(self, function: Any, replans: bool = False) -> None:
        self._function, self._names, self._replans = function, tuple(function.arg_names), replans
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(arguments: Mapping[str, Any], **constants: Any) -> None:
            taken = [arguments[name] for name in self._names if name in arguments]
            self._on_device(grid, taken, {n: x for n, x in constants.items() if n in self._names or n in _OPTIONS})

        return launch

    def _on_device(self, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        index = arguments[0].get_device()
        if index < 0 or index == torch.cuda.current_device():
            self._launch(grid, arguments, constants)
        else:
            with torch.cuda.device(index):
                self._launch(grid, arguments, constants)

    def _launch(self, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        if arguments[0].is_meta:
            dtypes = (a.dtype if isinstance(a, Tensor) else a for a in arguments)
            self._function.warmup(*dtypes, grid=grid, **constants, **_FUSION)
            return
        if not isinstance(self._function, JITFunction):  # Triton's interpreter
            self._function[grid](*arguments, **constants)
            return
        facts = [a if type(a) is int else a.data_ptr() % 16 if isinstance(a, Tensor) else 0 for a in arguments]
        key = (driver.active.get_current_device(), *facts, *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compile(grid, arguments, constants)
            if torch.version.hip is None:
                if len(self._compiled) == _MOST:
                    self._compiled.clear()
                self._compiled[key] = compiled
                self._check_spills(compiled)
        compiled[(*grid, 1, 1)[:3]](*arguments, *[constants[name] for name in self._names[len(arguments) :]])

    def _compile(self, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> Any:
        try:
            return self._function.warmup(*arguments, grid=grid, **constants, **_FUSION)
        except Exception as error:  # of many kinds: of Triton's language, of LLVM, of an assembler
            raise CannotCompile(f"Triton cannot compile {self._function.__name__}: {error}") from error

    def _check_spills(self, compiled: Any) -> None:
        """Only the driver knows, once the kernel is loaded: how many there are differs between versions of Triton."""
        if self._replans and compiled.run is not None and compiled.n_spills:
            raise Spilled(compiled.n_spills)
