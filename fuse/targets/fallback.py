"""Kernels that are compiled when they are called first: something else takes their place where they fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from fuse.report.runs import Part, Runs
from fuse.targets.fallback_warnings import warn_once

P = ParamSpec("P")
R = TypeVar("R")


class OrElse(Generic[P, R]):
    """``kernel`` until it raises; from then on what ``instead`` makes of the reason, after a warning. Want of memory is the
    caller's to know, and raised.

    kernel    it, and what takes its place, are called, and say in ``runs`` what they are
    refusals  what it is expected to raise; anything else is a defect, which must not cost the user the model
    """

    def __init__(self, kernel: Any, instead: Callable[[str], Any], refusals: tuple[type[Exception], ...], part: Part) -> None:
        self._now, self._refusals, self._part = kernel, refusals, part
        self._instead: Callable[[str], Any] | None = instead

    @property
    def runs(self) -> Runs:
        runs: Runs = self._now.runs
        return runs

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self._tried(lambda now: now(*args, **kwargs))
        return result

    def _tried(self, call: Callable[[Any], Any]) -> Any:
        if self._instead is None:
            return call(self._now)
        try:
            return call(self._now)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            defect = f"a kernel failed, please report it: {type(error).__name__}: {error}"
            reason = str(error) if isinstance(error, self._refusals) else defect
            self._now, self._instead = self._instead(reason), None
            warn_once(self._part, reason)
        return call(self._now)

    def tune(self) -> None:
        """As the kernel does."""
        if (tune := getattr(self._now, "tune", None)) is not None:
            tune()


class KernelOrElse(OrElse[..., Tensor]):
    """A fuse.targets.Kernel: refused in one of the ways to call it, it is in the other."""

    def __init__(self, kernel: Any, instead: Callable[[str], Any], refusals: tuple[type[Exception], ...]) -> None:
        super().__init__(kernel, instead, refusals, "forward")

    @property
    def source(self) -> Path | None:
        source: Path | None = self._now.source
        return source

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self._tried(lambda now: now.forward(*args))
        return result
