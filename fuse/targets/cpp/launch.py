"""C++ kernels: build a rendered source, load and call it."""

from __future__ import annotations

import ctypes
import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse.ir.interval import MAX_LENGTH
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.names import kernel_name
from fuse.kernel.source import ENTRY, header_of
from fuse.report.runs import Part, Runs
from fuse.targets import reference
from fuse.targets.cache import BuildFailed, entry
from fuse.targets.cpp import NAME, SUFFIX, op, render
from fuse.targets.cpp.compiler import OTHER_COMPILER, command_for, compile_library, depends, instruction_set
from fuse.targets.cpp.plan import lse_dtype, plan, plan_tile_map
from fuse.targets.cpp.render_tile_map import render_tile_map
from fuse.targets.dump import DumpedSource, dumped
from fuse.targets.fallback_warnings import left_to_reference

_LONG: dict[Part, str] = {
    "forward": f"calls of more than {MAX_LENGTH} positions",
    "backward": f"calls of more than {MAX_LENGTH} positions, or with sums of more than 1 GiB,",
    "weights": f"calls of more than {MAX_LENGTH} positions",
    "tile map": f"masks of more than {MAX_LENGTH} positions",
}
Run = Callable[[bytes], int]


class Rendered(NamedTuple):
    """A source that is to be built for instruction set ``isa``."""

    name: str
    isa: str
    text: str


@dataclass(frozen=True)
class Built:
    """A library that is loaded: its source in the cache, its entry, and what is to be said of it."""

    source: Path
    run: Run
    runs: Runs


def build(spec: AttentionSpec, isa: str | None = None) -> Built:
    """The built kernel of ``spec``, from the cache if it is there. Raises BuildFailed."""
    return build_source(*rendered(spec, isa))


def build_tile_map(spec: TileMap, isa: str | None = None) -> Built:
    """As ``build``, the kernel of a map."""
    return build_source(*rendered_tile_map(spec, isa))


def rendered(spec: AttentionSpec, isa: str | None = None) -> Rendered:
    chosen = plan(spec, isa or instruction_set())
    return Rendered(f"{kernel_name(spec)}_{chosen.isa}", chosen.isa, render.render(spec, chosen))


def rendered_tile_map(spec: TileMap, isa: str | None = None) -> Rendered:
    chosen = plan_tile_map(spec, isa or instruction_set())
    return Rendered(f"tile_map_{chosen.isa}", chosen.isa, render_tile_map(spec, chosen))


def build_source(name: str, isa: str, rendered: str) -> Built:
    """Raises BuildFailed, which names the file that somebody edited where it is not ours."""
    return _built(name, isa, dumped(name, rendered, SUFFIX))


def build_file(path: Path) -> Built:
    """The kernel of a file as it is, for the instruction set that it was rendered for. Raises BuildFailed."""
    text = path.read_text()
    isa = re.search(r"isa='(\w+)'", header_of(text).plan)
    return _built("alone", isa[1] if isa else instruction_set(), DumpedSource(text, path))


def _built(name: str, isa: str, source: DumpedSource) -> Built:
    command = command_for(isa)
    text = source.text if source.edited is None else f"#line 1 {json.dumps(str(source.edited))}\n{source.text}"
    try:
        found = entry(NAME, name, SUFFIX, text, depends(command), partial(compile_library, command), _load)
    except BuildFailed as error:
        raise source.refused(error) from error
    return Built(found.source, found.loaded, source.runs(found.source))


def _load(binary: Path) -> Run:
    """The entry of a library. Raises BuildFailed."""
    try:
        run: Any = getattr(ctypes.CDLL(str(binary)), ENTRY)
    except (OSError, AttributeError) as error:  # no library, or one without the entry
        raise BuildFailed(f"{str(error).replace(f'{binary.parent}/', '')}. {OTHER_COMPILER}") from error
    run.argtypes, run.restype = (ctypes.c_char_p,), ctypes.c_int
    found: Run = run
    return found


class Library:
    """A loaded kernel, called with one packed array of ``count`` int64: decoding it costs the kernel nothing.

    runs  what is to be said of it; it changes when a call is left to the reference
    """

    def __init__(self, built: Built, part: Part, count: int) -> None:
        self.runs = built.runs
        self.function, self._part, self._pack = op.Function(built.run, count), part, struct.Struct(f"{count}q").pack

    def call(self, arguments: Sequence[int]) -> bool:
        """False where the kernel does not take a call: a length exceeds its 32-bit positions, or sums of gradients memory."""
        code = self.function.run(self._pack(*arguments))
        if code > 1:
            raise RuntimeError({2: "out of memory"}.get(code, f"kernel error {code}"))
        if code:
            self.runs = left_to_reference(self.runs, self._part, _LONG[self._part])
        return not code


class _Loaded:
    """What calls of results and of maps have in common."""

    def __init__(self, spec: AttentionSpec | TileMap, built: Built, part: Part) -> None:
        self._spec = spec
        count = 3 + spec.batch + 2 + len(spec.symbols) + sum(1 + 2 * o.rank for o in spec.operands)
        self.library = Library(built, part, count)

    def run(self, out: Tensor, lse: Tensor | None, operands: Sequence[Tensor], sizes: Sequence[int]) -> bool:
        """Fills ``out`` and ``lse``; False as ``Library.call``."""
        strides = self._spec.out_strides(sizes)
        arguments = [torch.get_num_threads(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), *strides, *sizes]
        for tensor in operands:
            arguments.append(tensor.data_ptr())
            arguments += tensor.shape
            arguments += tensor.stride()
        return self.library.call(arguments)


class CppKernel:
    """A loaded kernel of an attention spec."""

    def __init__(self, spec: AttentionSpec, built: Built) -> None:
        self.source = built.source
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._lse_dtype: torch.dtype = getattr(torch, lse_dtype(spec))
        self._loaded = _Loaded(spec, built, "forward")

    @property
    def runs(self) -> Runs:
        return self._loaded.library.runs

    def known_as(self, text: str) -> None:
        op.take(text, self._spec, self._loaded.library.function)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """``operands`` as the spec numbers them, ``sizes`` as ``spec.symbols``; the result has ``spec.out_strides``."""
        out = torch.empty_strided(self._spec.out_shape(sizes), self._spec.out_strides(sizes), dtype=self._dtype)
        done = self._loaded.run(out, None, operands, sizes)
        return out if done else reference.attention(self._spec, operands, sizes, "eager")

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The result, and the log-sum-exp of its rows, which the backward kernel reads: see fuse.ir.gradient."""
        out = torch.empty_strided(self._spec.out_shape(sizes), self._spec.out_strides(sizes), dtype=self._dtype)
        lse = torch.empty(self._spec.lse_shape(sizes), dtype=self._lse_dtype)
        done = self._loaded.run(out, lse, operands, sizes)
        if done:
            return out, lse
        out, rounded = reference.attention_with_lse(self._spec, operands, sizes, "eager")
        return out, rounded.to(self._lse_dtype)


class CppTileMap:
    """A loaded kernel of a TileMap; called as a CppKernel is."""

    def __init__(self, spec: TileMap, built: Built) -> None:
        self.source = built.source
        self._spec = spec
        self._loaded = _Loaded(spec, built, "tile map")

    @property
    def runs(self) -> Runs:
        return self._loaded.library.runs

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        out = torch.empty(self._spec.out_shape(sizes), dtype=torch.uint8)
        return out if self._loaded.run(out, None, operands, sizes) else reference.tile_map(self._spec, operands, sizes)
