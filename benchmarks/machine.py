"""What a result was measured on, and the memory that a call takes on it."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuse.targets.cpp import compiler, cpu

os.environ.setdefault("FUSE_QUALIFY", "never")  # kernels are measured, be they preferred or not
_TELLING = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2", "fma", "asimd")


def facts() -> dict[str, Any]:
    version = subprocess.run([*compiler.cxx_compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": _cpuinfo().get("model name", platform.processor()), "generation": generation(), "cores": os.cpu_count(),
        "flags": [f for f in _TELLING if f in cpu.flags()],
        "instruction set": compiler.instruction_set(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "fuse": _version(), "compiler": version.splitlines()[0] if version else "", "load": round(os.getloadavg()[0], 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def generation() -> str:
    """The processor's family and model, as its maker numbers them: 25.17 is an EPYC of Zen 4."""
    return ".".join(_cpuinfo().get(name, "") for name in ("cpu family", "model")).strip(".")


def _cpuinfo() -> dict[str, str]:
    """Of the last core; empty where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def slug() -> str:
    """The machine as a part of a file's name."""
    kind = "-".join(filter(None, (platform.machine(), generation(), compiler.instruction_set())))
    return f"{kind}-{torch.get_num_threads()}threads"


def _version() -> str:
    try:
        return metadata.version("torch-fuse")
    except metadata.PackageNotFoundError:
        return "source tree"


def extra_peak(call: Callable[[], Tensor]) -> float:
    """MB that ``call`` holds at its peak, beside what there was before and its result. Linux only: read from /proc."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    before = _status("VmRSS")
    out = call()
    return (_status("VmHWM") - before - out.numel() * out.element_size()) / 2**20


def in_process(*arguments: object) -> float:
    """What this benchmark prints last when it is called with ``arguments``, in a process of its own; NaN where it fails."""
    command = [sys.executable, sys.argv[0], *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.nan


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
