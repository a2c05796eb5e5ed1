"""The memory that a call needs beside what there is before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """In bytes, of a call that has run before; None where the system does not tell."""
    if device.type == "cuda":
        return _on_gpu(call, device)
    return _on_cpu(call) if _RESET.exists() else None


def _on_gpu(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(call: Callable[[], object]) -> int:
    """Of the process, by proc(5)."""
    call()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept from earlier calls would hide the need for it
    _RESET.write_text("5")  # the high-water mark
    before = _bytes("VmRSS")
    call()
    return _bytes("VmHWM") - before


def _bytes(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(name))
