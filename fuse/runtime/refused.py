"""Kernels that are compiled when they are called first: something else takes their place where they fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class OrElse(Generic[P, R]):
    """``run`` until it raises; from then on ``instead``, after a warning. Want of memory is the caller's to know, and raised.

    refusals  what ``run`` is expected to raise; anything else is a defect, which must not cost the user the model
    """

    def __init__(
        self, run: Callable[P, R], instead: Callable[P, R], refusals: tuple[type[Exception], ...], warn: Callable[[str], None]
    ) -> None:
        self._run: Callable[P, R] | None = run
        self._instead, self._refusals, self._warn = instead, refusals, warn

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._run is not None:
            try:
                return self._run(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._run = None
                defect = f"a kernel failed, please report it: {type(error).__name__}: {error}"
                self._warn(str(error) if isinstance(error, self._refusals) else defect)
        return self._instead(*args, **kwargs)

    def tune(self) -> None:
        """As ``run`` does."""
        if (tune := getattr(self._run, "tune", None)) is not None:
            tune()


class KernelOrElse(OrElse[..., Tensor]):
    """A fuse.runtime.Kernel, of which each way to call it may be refused."""

    def __init__(self, kernel: Any, instead: Any, refusals: tuple[type[Exception], ...], warn: Callable[[str], None]) -> None:
        super().__init__(kernel, instead, refusals, warn)
        self.source: Path | None = kernel.source
        self.forward: OrElse[..., tuple[Tensor, Tensor]] = OrElse(kernel.forward, instead.forward, refusals, warn)
