"""What is measured, and what is found, as it goes from process to process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fuse.models import ModelCall
from fuse.report.report import Report


@dataclass(frozen=True)
class Case:
    """
    make       gives the model and its call, for ``arguments``; each process calls it, so it is one that pickle finds by its
               name, and it gives the same each time, where random numbers are drawn from one seed
    train      a step of training: the call, and gradients of what it gives; else a call without gradients
    options    of ``torch.compile(backend="fuse")``
    """

    make: Callable[..., ModelCall]
    arguments: tuple[Any, ...] = ()
    train: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """
    first    seconds of the first call, which compiles
    peak     bytes that a later call needs at its peak, beside what there is before it; None where the system does not tell
    error    of all results, and gradients, in the Euclidean norm, relative to float64's; None where there is nothing to compare
    report   what fuse did; None of the others
    """

    first: float
    peak: int | None
    error: float | None
    report: Report | None = None


@dataclass(frozen=True)
class Failed:
    """A way that cannot do it: ``why``, in one line."""

    why: str
