"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fuse.runtime import cpp, cpu

_TELLING = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2", "fma", "asimd")


def facts() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    version = subprocess.run([*cpp.compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": model, "cores": os.cpu_count(), "flags": [f for f in _TELLING if f in cpu.flags()],
        "instruction set": cpp.instruction_set(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "fuse": _version(), "compiler": version.splitlines()[0] if version else "", "load": round(os.getloadavg()[0], 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def slug() -> str:
    """The machine as a part of a file's name."""
    return f"{platform.machine()}-{cpp.instruction_set()}-{torch.get_num_threads()}threads"


def _version() -> str:
    try:
        return metadata.version("torch-fuse")
    except metadata.PackageNotFoundError:
        return "source tree"
