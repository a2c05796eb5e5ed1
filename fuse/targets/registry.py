"""The targets that there are. Nothing else imports one, or compares its name."""

from __future__ import annotations

from collections.abc import Set

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


def for_devices(name: str, devices: Set[str]) -> Target | None:
    """The target that options call ``name``, for a graph with tensors on ``devices``; None where it has no kernels there."""
    return next((t for t in _meant(name) if t.devices is None or devices <= t.devices), None)


def devices_of(name: str) -> tuple[str, ...]:
    """The types of devices that ``for_devices`` has something for."""
    return tuple(sorted({device for t in _meant(name) for device in t.devices or ()}))


def others_for(devices: Set[str]) -> tuple[str, ...]:
    """Targets that have kernels for ``devices``, and have to be asked for."""
    return tuple(t.name for t in _targets.values() if not t.by_itself and t.devices is not None and devices <= t.devices)


def tunable() -> tuple[str, ...]:
    """Targets whose kernels have plans that can be measured."""
    return tuple(t.name for t in _targets.values() if t.tunable)


def _meant(name: str) -> list[Target]:
    return [t for t in _targets.values() if t.by_itself] if name == AUTO else [_targets[name]]


for _target in (CppTarget(), TritonTarget(), ReferenceTarget()):
    register(_target)
