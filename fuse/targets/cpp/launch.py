"""C++ kernels: find the compiler, build a rendered source, load and call it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.source import ENTRY
from fuse.options import settings
from fuse.targets import reference
from fuse.targets.cache import Entry, entry, write_atomically
from fuse.targets.cpp import cpu, render
from fuse.targets.cpp.plan import lse_dtype, plan, plan_tile_map
from fuse.targets.cpp.render_tile_map import render_tile_map

GET_COMPILER = (
    "Install g++ or clang++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; "
    "conda: conda install cxx-compiler), or set CXX to a C++17 compiler."
)
_BUILD_SECONDS = 300
_FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_AVX512_FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512")
# With vectors of 8 lanes, kernels of -O2 were as fast as those of -O3 and took a third less to build; the others keep -O3
# until that is measured.
_ISA_FLAGS = {
    **dict.fromkeys(("avx512", "avx512_bf16", "amx", "amx_emulated"), _AVX512_FLAGS),
    "avx2": ("-O2", "-march=native", "-mno-avx512f"),
    "neon": ("-O3", "-mcpu=native"),
    "sse": ("-O3",),
}


class BuildFailed(RuntimeError):
    """No kernel could be built here; the message says why, and what to do where that is known."""


def compiler() -> tuple[str, ...]:
    """The C++ compiler as the start of a command: $CXX, g++, clang++ or c++. Raises BuildFailed where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        words = shlex.split(name or "")
        if words and (found := shutil.which(words[0])):
            return (found, *words[1:])
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


def build(spec: AttentionSpec, isa: str | None = None) -> Entry:
    """The built kernel of ``spec``, from the cache if it is there. Raises BuildFailed."""
    chosen = plan(spec, isa or instruction_set())
    name = f"attention_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}_{chosen.isa}"
    return build_source(name, chosen.isa, render.render(spec, chosen))


def build_tile_map(spec: TileMap, isa: str | None = None) -> Entry:
    """As ``build``, the kernel of a map."""
    chosen = plan_tile_map(spec, isa or instruction_set())
    return build_source(f"tile_map_{chosen.isa}", chosen.isa, render_tile_map(spec, chosen))


def build_source(name: str, isa: str, source: str) -> Entry:
    command = (*compiler(), *_FLAGS, *_ISA_FLAGS[isa])
    return entry("cpp", name, ".cpp", _dumped(name, source), _depends(command), partial(_compile, command))


def _depends(command: tuple[str, ...]) -> str:
    """What a binary depends on beside its source. Asking the compiler for its version would cost each process more."""
    file = Path(command[0]).resolve()
    return "\n".join([*command, f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}", _cpu()])


def _compile(command: tuple[str, ...], source: Path, binary: Path) -> None:
    """OpenMP shares torch's threads; where the compiler lacks it, the kernel runs on one."""
    failed = _run_compiler((*command, "-fopenmp", str(source), "-o", str(binary), "-lm"))
    failed = failed and _run_compiler((*command, str(source), "-o", str(binary), "-lm"))
    if failed:
        raise BuildFailed(failed)


def _run_compiler(command: tuple[str, ...]) -> str:
    """Empty, or what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C++ compiler did not run: {error}. {GET_COMPILER}"
    return f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}" if done.returncode else ""


def _dumped(name: str, source: str) -> str:
    """With FUSE_DUMP, the text of the kernel's file there, which somebody may have edited; it is written if it is not there."""
    folder = settings().dump
    if folder is None:
        return source
    path = folder / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.cpp"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, source)
    return path.read_text()


class _Loaded:
    """A loaded library. One packed array of int64 carries the call: decoding it costs the kernel nothing."""

    def __init__(self, spec: AttentionSpec | TileMap, built: Entry) -> None:
        self._spec = spec
        self._run = getattr(ctypes.CDLL(str(built.binary)), ENTRY)
        self._run.argtypes, self._run.restype = (ctypes.c_char_p,), ctypes.c_int
        count = 3 + spec.batch + 2 + len(spec.symbols) + sum(1 + 2 * o.rank for o in spec.operands)
        self._pack = struct.Struct(f"{count}q").pack

    def run(self, out: Tensor, lse: Tensor | None, operands: Sequence[Tensor], sizes: Sequence[int]) -> bool:
        """Fills ``out`` and ``lse``; False where a length exceeds the kernel's 32-bit positions, MAX_LENGTH."""
        strides = self._spec.out_strides(sizes)
        arguments = [torch.get_num_threads(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), *strides, *sizes]
        for tensor in operands:
            arguments.append(tensor.data_ptr())
            arguments += tensor.shape
            arguments += tensor.stride()
        code = self._run(self._pack(*arguments))
        if code > 1:
            raise RuntimeError({2: "out of memory"}.get(code, f"kernel error {code}"))
        return not code


class CppKernel:
    """A loaded kernel of an attention spec."""

    def __init__(self, spec: AttentionSpec, built: Entry) -> None:
        self.source = built.source
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._lse_dtype: torch.dtype = getattr(torch, lse_dtype(spec, "cpp"))
        self._loaded = _Loaded(spec, built)

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

    def __init__(self, spec: TileMap, built: Entry) -> None:
        self.source = built.source
        self._spec = spec
        self._loaded = _Loaded(spec, built)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        out = torch.empty(self._spec.out_shape(sizes), dtype=torch.uint8)
        return out if self._loaded.run(out, None, operands, sizes) else reference.tile_map(self._spec, operands, sizes)
