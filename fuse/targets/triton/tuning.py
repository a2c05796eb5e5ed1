"""Which plan of a kernel is the fastest: measured on a call's own operands, and kept on disk for later processes."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from fuse.settings import settings
from fuse.targets import records
from fuse.targets.triton import NAME
from fuse.targets.triton.function import REFUSALS
from fuse.targets.triton.module import despite_spills

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
VERSION = 2
Clock = Callable[[Callable[[], None]], float]
P = TypeVar("P", bound="DataclassInstance")  # a plan, which is frozen
_ROUNDS, _ENOUGH = 7, 2e-3  # batches of launches, and the seconds that one takes


@dataclass(frozen=True)
class Subject:
    """What a result belongs to.

    kernel  the rendered source, whose name has its digest
    device  as its driver names it
    sizes   their magnitudes: powers of two share a result
    """

    kernel: Path
    device: str
    sizes: tuple[int, ...]

    @property
    def path(self) -> Path:
        facts = json.dumps([VERSION, self.kernel.name, self.device, self.sizes, _versions()])
        return settings().cache_dir / NAME / f"tuned-{hashlib.sha256(facts.encode()).hexdigest()[:20]}.json"


def recorded(subject: Subject, plans: Sequence[P]) -> P | None:
    """The result of an earlier run, if it is one of ``plans``; a file that is not whole is none."""
    found = records.read(subject.path) or {}
    return next((plan for plan in plans if asdict(plan) == found.get("fastest")), None)


def fastest(subject: Subject, plans: Sequence[P], launch: Callable[[P], None], clock: Clock) -> P:
    """The plan with which ``launch`` takes the least time, by ``clock``; it is kept. Plans that are refused are left out.

    ``launch`` must give the same however often it runs. Raises one of REFUSALS where all are.
    """
    found: dict[P, float] = {}
    for number, plan in enumerate(plans):
        _show(subject, number, len(plans))
        try:
            despite_spills(plan, launch)
            found[plan] = clock(lambda plan=plan: launch(plan))  # type: ignore[misc]
        except REFUSALS:
            if number == len(plans) - 1 and not found:
                raise
    _show(subject, len(plans), len(plans))
    best = min(found, key=found.__getitem__)
    _keep(subject, found, best)
    return best


def _keep(subject: Subject, found: dict[P, float], best: P) -> None:
    """What cannot be kept costs the next process a measurement, and nobody a call."""
    measured = [{**asdict(plan), "seconds": seconds} for plan, seconds in found.items()]
    facts = {"kernel": subject.kernel.name, "device": subject.device, "sizes": subject.sizes, **_versions()}
    try:
        records.write(subject.path, {**facts, "fastest": asdict(best), "measured": measured})
    except OSError as error:
        log.warning("what was measured is not kept: %s. FUSE_CACHE_DIR can be set to a folder that is writable.", error)


def seconds(launch: Callable[[], None]) -> float:
    """The median time of a launch on the current device and stream."""

    def batch(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            launch()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / count

    count = max(1, min(100, round(_ENOUGH / max(batch(1), 1e-6))))
    return statistics.median(batch(count) for _ in range(_ROUNDS))


def _show(subject: Subject, done: int, of: int) -> None:
    """A bar where somebody may be looking."""
    if sys.stderr.isatty():
        bar = "#" * done + "." * (of - done)
        print(f"\rfuse tunes {subject.kernel.stem[:40]} [{bar}]", end="\n" if done == of else "", file=sys.stderr, flush=True)


@cache
def _versions() -> dict[str, str]:
    import triton

    try:
        own = metadata.version("torch-fuse")
    except metadata.PackageNotFoundError:
        own = "source tree"
    return {
        "fuse": own,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": str(torch.version.cuda or torch.version.hip),
    }
