"""Times on a device, of several ways in one interleaved run; what the device is, and how fast it multiplies."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

os.environ.setdefault("FUSE_QUALIFY", "never")  # kernels are measured, be they preferred or not

_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu",
          "clocks_event_reasons.active")  # fmt: skip
_BATCH = 2e-3  # seconds that calls of one way take together, so that starting the clock is no part of the result
Call = Callable[[], object]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(call: Call, device: str, count: int = 1) -> float:
    """Seconds of one call, out of ``count``. Caches hold what the other ways left there."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def medians(calls: Mapping[str, Call], device: str, seconds: float) -> dict[str, float]:
    """Seconds of each way: rounds over all ways until ``seconds`` are over, at least three, after one to warm up.

    A way that takes long sits out once it has had its share of the time, after three rounds.
    """
    counts = {}
    for name, call in calls.items():
        synchronize(device)
        once(call, device)
        counts[name] = max(1, min(200, round(_BATCH / max(once(call, device), 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, taken.values())) < 3:
        for name, call in calls.items():
            if len(taken[name]) < 3 or spent[name] < seconds / len(calls):
                taken[name].append(once(call, device, counts[name]))
                spent[name] += taken[name][-1] * counts[name]
        if all(len(rounds) >= 3 and spent[name] >= seconds / len(calls) for name, rounds in taken.items()):
            break
    return {name: statistics.median(rounds) for name, rounds in taken.items()}


def multiply_rate(device: str, dtype: str, size: int) -> float:
    """Operations per second of a product of square matrices of ``size``, by torch."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = medians({"product": lambda: a @ b}, device, 0.5)["product"]
    return 2 * size**3 / seconds


def device_facts(device: str) -> dict[str, Any]:
    """Name, clocks and limits as nvidia-smi reports them now."""
    if device != "cuda":
        return {"device": device}
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda,
        "hip": torch.version.hip, "processors": torch.cuda.get_device_properties(0).multi_processor_count,
    }  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return facts | dict(zip(_QUERY, (x.strip() for x in done.splitlines()[0].split(",")), strict=False))
    except (OSError, subprocess.SubprocessError) as error:
        return facts | {"clocks": f"unknown: {type(error).__name__}"}
