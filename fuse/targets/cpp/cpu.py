"""What this machine's processor can do."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

# Linux grants AMX to a process that asks (Documentation/arch/x86/xstate.rst): its tiles enlarge every signal frame.
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def flags() -> tuple[str, ...]:
    """Names of the instruction sets, as Linux lists them; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((tuple(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), ())


@cache
def matrix_unit() -> str | None:
    """What multiplies bfloat16 beside AVX-512: "amx", where the kernel lets this process use it, "avx512_bf16" or None."""
    if "avx512_bf16" not in flags():
        return None
    return "amx" if {"amx_tile", "amx_bf16"} <= set(flags()) and _tiles_granted() else "avx512_bf16"


def _tiles_granted() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return int(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0
