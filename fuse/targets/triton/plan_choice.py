"""Which plan a kernel is launched with: by device and by the magnitude of sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Generic

import torch

from fuse.targets.triton import tuning
from fuse.targets.triton.module import architecture_of, launched
from fuse.targets.triton.plan import Architecture
from fuse.targets.triton.tuning import P, Subject


class PlanChoice(Generic[P]):
    """Of one kernel: what fits the device, the fastest first where that was measured, now or by an earlier process.

    tune  measure where nobody has
    """

    def __init__(self, make: Callable[[Architecture], tuple[P, ...]]) -> None:
        self._make = make
        self._chosen: dict[tuple[object, ...], tuple[P, ...]] = {}
        self.tune = False

    def planned(self, device: torch.device) -> P:
        """What the planner prefers, whatever was measured."""
        key = (device.index, device.type)
        if key not in self._chosen:
            self._chosen[key] = self._make(architecture_of(device))
        return self._chosen[key][0]

    def launch(self, source: Path, device: torch.device, sizes: Sequence[int], launch: Callable[[P], None]) -> None:
        """By the first plan that the device has resources for; ``sizes`` are those that the choice depends on."""
        key = (device.index, device.type, self.tune, *[n.bit_length() for n in sizes])
        plans = self._chosen.get(key)
        if plans is None:
            plans = self._first(source, device, sizes, launch)
        self._chosen[key] = launched(plans, launch)

    def _first(self, source: Path, device: torch.device, sizes: Sequence[int], launch: Callable[[P], None]) -> tuple[P, ...]:
        self.planned(device)
        plans = self._chosen[device.index, device.type]
        if device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return plans
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else architecture_of(device).name
        subject = Subject(source, name, tuple(n.bit_length() for n in sizes))
        best = tuning.recorded(subject, plans)
        if best is None and self.tune:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                best = tuning.fastest(subject, plans, launch, tuning.seconds)
        return plans if best is None else (best, *[plan for plan in plans if plan != best])
