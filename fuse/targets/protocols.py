"""What kernels are to those who call them, be they generated or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.report.runs import Runs


class Kernel(Protocol):
    """Computes one spec. ``source`` is the generated file, None where the reference stands in for a kernel."""

    @property
    def source(self) -> Path | None: ...

    @property
    def runs(self) -> Runs: ...

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor: ...

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The result and the log-sum-exp of its rows, as fuse.ir.gradient defines it."""
        ...


class Backward(Protocol):
    """Computes gradients of the wanted operands, each laid out as empty_like of it; ``grad_out`` may have any strides.

    ``grad_lse``, of the log-sum-exp where that is a result too, is dense and of its dtype.
    """

    @property
    def runs(self) -> Runs: ...

    def __call__(
        self, grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor,
        grad_lse: Tensor | None = None,
    ) -> list[Tensor]: ...  # fmt: skip


class WeightsKernel(Protocol):
    """Writes a matrix of weights from the scores and the log-sum-exp of their rows, as ``Kernel.forward`` gives it."""

    @property
    def runs(self) -> Runs: ...

    def __call__(self, operands: Sequence[Tensor], lse: Tensor, sizes: Sequence[int], heads: int) -> Tensor:
        """Dense, of shape ``weights_shape(spec, sizes, heads)``: see fuse.ops.weights."""
        ...


class MapKernel(Protocol):
    """Computes a map of tiles."""

    @property
    def runs(self) -> Runs: ...

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor: ...


@runtime_checkable
class Direct(Protocol):
    """A kernel that torch can call without Python."""

    def known_as(self, text: str) -> None:
        """From the next call on, of the spec that is written ``text``."""
        ...


@runtime_checkable
class Short(Protocol):
    """A target to whose kernels there is a shorter way than torch's operators that are written in Python."""

    def shorten_calls(self) -> None:
        """Makes it, before the first of the calls. Never fails."""
        ...

    def caller(self, operator: str, text: str, slow: Callable[..., Any]) -> Callable[..., Any]:
        """What does the same as ``slow``, sooner: calls ``fuse::operator`` of the spec that is written ``text``.

        Where that is ``slow`` itself there is no such way.
        """
        ...


@runtime_checkable
class Writes(Protocol):
    """A target that has kernels for weights."""

    def weights(self, spec: AttentionSpec) -> WeightsKernel:
        """As ``forward``."""
        ...


@runtime_checkable
class Packaging(Protocol):
    """A target whose kernels can be called in processes without Python."""

    def package(self, specs: Mapping[str, AttentionSpec], folder: Path) -> Path:
        """Writes the kernels of ``specs``, by the text that calls give, and a library that calls them: the path of that."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A kernel that can measure which of its plans is the fastest."""

    def tune(self) -> None: ...


@dataclass(frozen=True)
class Finding:
    """Something that kernels need, or are made for. ``remedy``: how to get what is missing; "" where nothing is."""

    what: str
    says: str
    remedy: str = ""


@runtime_checkable
class Examined(Protocol):
    """A target that can say what of this machine it uses, and what it misses."""

    def examine(self) -> list[Finding]: ...


@runtime_checkable
class Shown(Protocol):
    """A target that can say what it would build for this machine, without building it."""

    def forward_source(self, spec: AttentionSpec) -> str: ...

    def backward_source(self, of: Gradient) -> str:
        """Raises Unsupported."""
        ...

    def tile_map_source(self, spec: TileMap) -> str: ...

    def weights_source(self, spec: AttentionSpec) -> str:
        """Raises Unsupported."""
        ...


@runtime_checkable
class FromFile(Protocol):
    """A target that can run a file as it is, be it edited. Each raises BuildFailed where that cannot be built."""

    def forward_of(self, spec: AttentionSpec, source: Path) -> Kernel: ...

    def backward_of(self, of: Gradient, source: Path) -> Backward:
        """Raises Unsupported, too."""
        ...

    def tile_map_of(self, spec: TileMap, source: Path) -> MapKernel: ...
