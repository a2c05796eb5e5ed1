"""C++ kernels: find the compiler, build a rendered source, load and call it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fuse import planner
from fuse.codegen import render
from fuse.options import settings
from fuse.runtime import cpu
from fuse.runtime.cache import Entry, entry, write_atomically
from fuse.spec import AttentionSpec

GET_COMPILER = (
    "Install g++ or clang++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; "
    "conda: conda install cxx-compiler), or set CXX to a C++17 compiler."
)
_BUILD_SECONDS = 300
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_AVX512_FLAGS = ("-march=native", "-mprefer-vector-width=512")
_ISA_FLAGS = {
    **dict.fromkeys(("avx512", "avx512_bf16", "amx", "amx_emulated"), _AVX512_FLAGS),
    "avx2": ("-march=native", "-mno-avx512f"),
    "neon": ("-mcpu=native",),
    "sse": (),
}


class BuildFailed(RuntimeError):
    """No kernel could be built here; the message says why, and what to do where that is known."""


def compiler() -> str:
    """Path of the C++ compiler: $CXX, g++, clang++ or c++. Raises BuildFailed where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildFailed(f"no C++ compiler was found. {GET_COMPILER}")


@cache
def instruction_set() -> str:
    """One of planner.ISAS, for this machine."""
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


@cache
def _compiler_version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _openmp(path: str) -> tuple[str, ...]:
    """OpenMP shares torch's threads; without it kernels run on one."""
    test = [path, "-fopenmp", "-x", "c++", "-", "-shared", "-fPIC", "-o", os.devnull]
    done = subprocess.run(test, input="#include <omp.h>\n", capture_output=True, text=True, check=False)
    return ("-fopenmp",) if done.returncode == 0 else ()


def build(spec: AttentionSpec, isa: str | None = None) -> Entry:
    """The built kernel of ``spec``, from the cache if it is there. Raises BuildFailed."""
    plan = planner.plan(spec, isa or instruction_set())
    source = render.render(spec, plan)
    path = compiler()
    command = (path, *_FLAGS, *_ISA_FLAGS[plan.isa], *_openmp(path))

    def run(source_path: Path, binary: Path) -> None:
        _compile((*command, str(source_path), "-o", str(binary), "-lm"))

    depends = "\n".join([*command, _compiler_version(path), _cpu()])
    name = f"attention_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}_{plan.isa}"
    return entry("cpp", name, ".cpp", _dumped(name, source), depends, run)


def _compile(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"the C++ compiler did not run: {error}. {GET_COMPILER}") from None
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _dumped(name: str, source: str) -> str:
    """With FUSE_DUMP, the text of the kernel's file there, which somebody may have edited; it is written if it is not there."""
    folder = settings().dump
    if folder is None:
        return source
    import hashlib

    path = folder / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.cpp"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, source)
    return path.read_text()


class CppKernel:
    """A loaded kernel. One packed array of int64 carries the call: decoding it costs the kernel nothing."""

    def __init__(self, spec: AttentionSpec, built: Entry) -> None:
        self.source = built.source
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._run = getattr(ctypes.CDLL(str(built.binary)), render.ENTRY)
        self._run.argtypes, self._run.restype = (ctypes.c_char_p,), ctypes.c_int
        count = 2 + spec.batch + 2 + len(spec.symbols) + sum(1 + 2 * o.rank for o in spec.operands)
        self._pack = struct.Struct(f"{count}q").pack

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """``operands`` as the spec numbers them, ``sizes`` the values of ``spec.symbols``; the result has ``spec.out_strides``."""
        shape, strides = self._spec.out_shape(sizes), self._spec.out_strides(sizes)
        out = torch.empty_strided(shape, strides, dtype=self._dtype)
        arguments = [torch.get_num_threads(), out.data_ptr(), *strides, *sizes]
        for tensor in operands:
            arguments.append(tensor.data_ptr())
            arguments += tensor.shape
            arguments += tensor.stride()
        code = self._run(self._pack(*arguments))
        if code:
            raise RuntimeError({1: "a sequence is longer than 2**24", 2: "out of memory"}.get(code, f"kernel error {code}"))
        return out
