"""C++ kernels: find the compiler, build a rendered source, load and call it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse.errors import GET_COMPILER
from fuse.ir.interval import MAX_LENGTH
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.source import ENTRY
from fuse.report.runs import Part, Runs
from fuse.targets import reference
from fuse.targets.cache import BuildFailed, entry
from fuse.targets.cpp import NAME, SUFFIX, cpu, render
from fuse.targets.cpp.plan import lse_dtype, plan, plan_tile_map
from fuse.targets.cpp.render_tile_map import render_tile_map
from fuse.targets.dump import dumped
from fuse.targets.fallback_warnings import left_to_reference

OTHER_COMPILER = "Set CXX to another C++17 compiler"
_BUILD_SECONDS = 300
_FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_AVX512_FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512")
# With vectors of 8 lanes, kernels of -O2 were as fast as those of -O3 and took a third less to build. With AVX-512 they took
# 0.99 to 1.02 times as long in float32, in bfloat16 up to 1.04 and for few queries 1.5. NEON was not measured.
_ISA_FLAGS = {
    **dict.fromkeys(("avx512", "avx512_bf16", "amx", "amx_emulated"), _AVX512_FLAGS),
    "avx2": ("-O2", "-march=native", "-mno-avx512f"),
    "neon": ("-O3", "-mcpu=native"),
    "sse": ("-O3",),
}
# Loading a library may end the process: by a signal where it was cut short, or by what it does then.
_LOADS, _LIVES = b"loads", b", lives"
_PROBE = f"""
import ctypes, os, sys
os.write(1, {_LOADS!r})
try:
    ctypes.CDLL(sys.argv[1])
except OSError:
    pass
os.write(1, {_LIVES!r})
os._exit(0)
"""
_PROBE_SECONDS = 60
_LONG: dict[Part, str] = {
    "forward": f"calls of more than {MAX_LENGTH} positions",
    "backward": f"calls of more than {MAX_LENGTH} positions, or with sums of more than 1 GiB,",
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


def cxx_compiler() -> tuple[str, ...]:
    """The C++ compiler as the start of a command: $CXX if that is set, else g++, clang++ or c++.

    Raises BuildFailed where there is none: another than the one that was asked for is not taken in its place.
    """
    chosen = os.environ.get("CXX")
    try:
        asked = shlex.split(chosen or "")
    except ValueError as error:
        raise BuildFailed(f"CXX={chosen} is no command: {error}. Correct or unset it") from error
    for name, *options in [asked] if asked else [["g++"], ["clang++"], ["c++"]]:
        if found := shutil.which(name):
            return (found, *options)
    if asked:
        raise BuildFailed(f"CXX={chosen!r}: there is no program {asked[0]!r} that can be run. Unset it, or: {GET_COMPILER}")
    raise BuildFailed(f"no C++ compiler was found. {GET_COMPILER}")


@cache
def instruction_set() -> str:
    """One of plan.ISAS, for this machine."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "neon"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability.startswith("avx512"):
        return cpu.matrix_unit() or "avx512"
    return "avx2" if capability.startswith("avx2") else "sse"


@cache
def _cpu() -> str:
    """What -march=native depends on."""
    return f"{platform.machine()} {platform.processor()} {' '.join(cpu.flags())}"


def build(spec: AttentionSpec, isa: str | None = None) -> Built:
    """The built kernel of ``spec``, from the cache if it is there. Raises BuildFailed."""
    return build_source(*rendered(spec, isa))


def build_tile_map(spec: TileMap, isa: str | None = None) -> Built:
    """As ``build``, the kernel of a map."""
    return build_source(*rendered_tile_map(spec, isa))


def rendered(spec: AttentionSpec, isa: str | None = None) -> Rendered:
    chosen = plan(spec, isa or instruction_set())
    name = f"attention_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}_{chosen.isa}"
    return Rendered(name, chosen.isa, render.render(spec, chosen))


def rendered_tile_map(spec: TileMap, isa: str | None = None) -> Rendered:
    chosen = plan_tile_map(spec, isa or instruction_set())
    return Rendered(f"tile_map_{chosen.isa}", chosen.isa, render_tile_map(spec, chosen))


def build_source(name: str, isa: str, rendered: str) -> Built:
    """Raises BuildFailed, which names the file that somebody edited where it is not ours."""
    source, command = dumped(name, rendered, SUFFIX), _command(isa)
    text = source.text if source.edited is None else f"#line 1 {json.dumps(str(source.edited))}\n{source.text}"
    try:
        found = entry(NAME, name, SUFFIX, text, _depends(command), partial(_compile, command), _load)
    except BuildFailed as error:
        raise source.refused(error) from error
    return Built(found.source, found.loaded, source.runs(found.source))


def toolchain() -> str:
    """What kernels are built by on this machine, and for which processor."""
    try:
        return _depends(_command(instruction_set()))
    except BuildFailed as error:
        return str(error)


def _command(isa: str) -> tuple[str, ...]:
    return (*cxx_compiler(), *_FLAGS, *_ISA_FLAGS[isa])


def _depends(command: tuple[str, ...]) -> str:
    """What a binary depends on beside its source. Asking the compiler for its version would cost each process more."""
    file = Path(command[0]).resolve()
    return "\n".join([*command, f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}", _cpu()])


def _compile(command: tuple[str, ...], source: Path, binary: Path) -> None:
    """OpenMP shares torch's threads; where the compiler lacks it, the kernel runs on one."""
    end = time.monotonic() + _BUILD_SECONDS
    failed = _run_compiler((*command, "-fopenmp", str(source), "-o", str(binary), "-lm"), end)
    failed = failed and _run_compiler((*command, str(source), "-o", str(binary), "-lm"), end)
    if failed:
        raise BuildFailed(failed)
    if not binary.exists():
        raise BuildFailed(f"{shlex.join(command)} made no library of {source}, and said that all went well. {OTHER_COMPILER}")
    if _ends_its_process(binary):
        raise BuildFailed(f"{shlex.join(command)} made a library of {source} that ends or stops its process. {OTHER_COMPILER}")


def _ends_its_process(binary: Path) -> bool:
    """Asks a process that may be ended, or wait for ever. Whether the library is of use is not asked: only torch's process has
    torch's OpenMP.
    """
    command = [sys.executable, "-ISc", _PROBE, str(binary)]
    try:
        said = subprocess.run(command, capture_output=True, timeout=_PROBE_SECONDS, check=False).stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
    except OSError:  # an embedded Python, which is no program
        return False
    return said == _LOADS


def _run_compiler(command: tuple[str, ...], end: float) -> str:
    """Empty, or what went wrong, first errors first. At ``end``, by the monotonic clock, it is ended with what it started."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        return f"the C++ compiler did not run: {error}. {GET_COMPILER}"
    try:
        errors = process.communicate(timeout=max(0.0, end - time.monotonic()))[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"{shlex.join(command)} had not ended after {_BUILD_SECONDS} s. {OTHER_COMPILER}"
    said = errors.strip()[:2000] or f"exit status {process.returncode}"
    return f"{said}\nsaid {shlex.join(command)}. {OTHER_COMPILER}, or report this" if process.returncode else ""


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
        self._run, self._part, self._pack = built.run, part, struct.Struct(f"{count}q").pack

    def call(self, arguments: Sequence[int]) -> bool:
        """False where the kernel does not take a call: a length exceeds its 32-bit positions, or sums of gradients memory."""
        code = self._run(self._pack(*arguments))
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
