"""Rendered Triton modules: loaded, and launched with plans that fit the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import TypeVar

import torch
from triton.runtime import driver

from fuse.report.runs import Runs
from fuse.targets.cache import BuildFailed, write_once
from fuse.targets.dump import DumpedSource, dumped
from fuse.targets.triton import NAME, SUFFIX
from fuse.targets.triton.function import REFUSALS, Function, Spilled
from fuse.targets.triton.plan import ARCHITECTURES, Architecture, architecture

P = TypeVar("P")  # a plan
_SPILLING = 3  # plans: each is compiled, in seconds


class _Source(SourceFileLoader):
    """Reads a module and no bytecode beside it, which nothing protects from being cut short or being another's."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


@dataclass(frozen=True)
class Module:
    """A module that is loaded: its source, what is in it, and what is to be said of it."""

    source: Path
    content: ModuleType
    runs: Runs = Runs("kernel")

    def function(self, name: str, replans: bool = False) -> Function:
        """As Function has it. Raises BuildFailed."""
        try:
            return Function(getattr(self.content, name), replans)
        except AttributeError as error:
            raise BuildFailed(f"{self.source} has no function {name}") from error


def made(name: str, rendered: str) -> Module:
    """The module of ``rendered``, or of what somebody made of it in FUSE_DUMP's folder. Raises BuildFailed."""
    source = dumped(name, rendered, SUFFIX)
    return _loaded(source.edited or write_once(NAME, name, SUFFIX, rendered), source)


def from_file(path: Path) -> Module:
    """The module of a file as it is. Raises BuildFailed."""
    return _loaded(path, DumpedSource(path.read_text(), path))


def _loaded(path: Path, source: DumpedSource) -> Module:
    try:
        return Module(path, load_module(path), source.runs(path))
    except Exception as error:
        raise source.refused(error) from error


def load_module(path: Path) -> ModuleType:
    name = f"fuse_generated_{path.stem}"
    spec = spec_from_file_location(name, path, loader=_Source(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launched(plans: tuple[P, ...], launch: Callable[[P], None]) -> tuple[P, ...]:
    """Launches with the first plan that is not refused and spills nothing, and gives the plans from that one on.

    Where _SPILLING plans spill, or all that are not refused, it is the one that spills least.
    """
    spilled: dict[P, int] = {}
    for number, plan in enumerate(plans):
        if len(spilled) == _SPILLING:
            break
        try:
            launch(plan)
            return plans[number:]
        except Spilled as spills:
            spilled[plan] = spills.count
        except REFUSALS:  # the planner's model is no proof
            if number == len(plans) - 1 and not spilled:
                raise
    least = min(spilled, key=spilled.__getitem__)
    despite_spills(least, launch)
    return plans[plans.index(least) :]


def despite_spills(plan: P, launch: Callable[[P], None]) -> None:
    """``launch(plan)``, whose kernels may each say once that they spill."""
    while True:
        try:
            return launch(plan)
        except Spilled:
            continue


def current_architecture() -> Architecture:
    """Of the current device; without one, as in Triton's interpreter, a common one."""
    try:
        target = driver.active.get_current_target()
    except RuntimeError:
        return ARCHITECTURES["sm_80"]
    return architecture(target.arch if target.backend == "hip" else f"sm_{target.arch}")


def architecture_of(device: torch.device) -> Architecture:
    """That of the current device for tensors that are on none."""
    if device.type != "cuda":
        return current_architecture()
    with torch.cuda.device(device):
        return current_architecture()


def precision() -> str:
    """Of products in float32, as torch is told. It can be told by two names; the older, allow_tf32, raises after the newer."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors, of the current device for tensors that are on none; one where Triton's interpreter runs."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(device if device.type == "cuda" else None).multi_processor_count
