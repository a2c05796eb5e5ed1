"""The targets that there are. Nothing else imports one, or compares its name."""

from __future__ import annotations

from collections.abc import Set

import torch

from fuse.targets.cpp.target import CppTarget
from fuse.targets.standin import ReferenceTarget
from fuse.targets.target import Target
from fuse.targets.triton.target import TritonTarget

AUTO = "auto"
_targets: dict[str, Target] = {}


def register(target: Target) -> None:
    """Makes ``target`` known under its name, in the place of another of that name."""
    _targets[target.name] = target


def named(name: str) -> Target:
    return _targets[name]


def names() -> tuple[str, ...]:
    return tuple(_targets)


def for_device(name: str, device: torch.device) -> Target | None:
    """The target that options call ``name``, for tensors on ``device``; None where it has no kernels there."""
    if name != AUTO:
        return _targets[name] if _has_kernels(_targets[name], device.type) else None
    return next((t for t in _targets.values() if _has_kernels(t, device.type) and t.by_itself(device)), None)


def devices_of(name: str) -> tuple[str, ...]:
    """The types of devices that ``for_device`` has something for."""
    types = {device for t in _targets.values() for device in t.devices or ()}
    return tuple(sorted(device for device in types if for_device(name, torch.device(device)) is not None))


def others_for(devices: Set[str]) -> tuple[str, ...]:
    """Targets that have kernels for ``devices``."""
    return tuple(t.name for t in _targets.values() if t.devices is not None and devices <= t.devices)


def tunable() -> tuple[str, ...]:
    """Targets whose kernels have plans that can be measured."""
    return tuple(t.name for t in _targets.values() if t.tunable)


def _has_kernels(target: Target, device: str) -> bool:
    return target.devices is None or device in target.devices


for _target in (CppTarget(), TritonTarget(), ReferenceTarget()):
    register(_target)
