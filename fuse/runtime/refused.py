"""Kernels that are compiled when they are called first: something else takes their place where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from torch import Tensor

from fuse.runs import Part, Runs
from fuse.runtime.told import warn

P = ParamSpec("P")
R = TypeVar("R")


class OrElse(Generic[P, R]):
    """``kernel`` until it raises one of ``refusals``; from then on what ``instead`` makes of the reason, after a warning.

    kernel, and what takes its place, are called, and say in ``runs`` what they are
    """

    def __init__(self, kernel: Any, instead: Callable[[str], Any], refusals: tuple[type[Exception], ...], part: Part) -> None:
        self._now, self._instead, self._refusals, self._part = kernel, instead, refusals, part

    @property
    def runs(self) -> Runs:
        runs: Runs = self._now.runs
        return runs

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self._tried(lambda now: now(*args, **kwargs))
        return result

    def _tried(self, call: Callable[[Any], Any]) -> Any:
        try:
            return call(self._now)
        except self._refusals as error:
            self._now = self._instead(str(error))
            warn(self._part, str(error))
        return call(self._now)

    def tune(self) -> None:
        """As the kernel does."""
        if (tune := getattr(self._now, "tune", None)) is not None:
            tune()


class KernelOrElse(OrElse[..., Tensor]):
    """A fuse.runtime.Kernel: refused in one of the ways to call it, it is in the other."""

    def __init__(self, kernel: Any, instead: Callable[[str], Any], refusals: tuple[type[Exception], ...]) -> None:
        super().__init__(kernel, instead, refusals, "forward")

    @property
    def source(self) -> Path | None:
        source: Path | None = self._now.source
        return source

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self._tried(lambda now: now.forward(*args))
        return result
