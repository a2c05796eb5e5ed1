"""The C++ compiler: which one, how it is called, and what of it a library depends on."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import torch

from fuse.errors import GET_COMPILER
from fuse.targets.cache import BuildFailed
from fuse.targets.cpp import cpu

OTHER_COMPILER = "Set CXX to another C++17 compiler"
_BUILD_SECONDS = 300
FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_AVX512_FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512")
# With vectors of 8 lanes, kernels of -O2 were as fast as those of -O3 and took a third less to build. With AVX-512 they took
# 0.99 to 1.02 times as long in float32, in bfloat16 up to 1.04 and for few queries 1.5. NEON was not measured.
ISA_FLAGS = {
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
def processor() -> str:
    """What -march=native depends on."""
    return f"{platform.machine()} {platform.processor()} {' '.join(cpu.flags())}"


def toolchain() -> str:
    """What kernels are built by on this machine, and for which processor."""
    try:
        return depends(command_for(instruction_set()))
    except BuildFailed as error:
        return str(error)


def command_for(isa: str) -> tuple[str, ...]:
    return (*cxx_compiler(), *FLAGS, *ISA_FLAGS[isa])


def depends(command: tuple[str, ...]) -> str:
    """What a binary depends on beside its source. Asking the compiler for its version would cost each process more."""
    file = Path(command[0]).resolve()
    return "\n".join([*command, f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}", processor()])


def compile_library(command: tuple[str, ...], source: Path, binary: Path) -> None:
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
