"""What runs where there is no kernel: the same functions in plain PyTorch, slowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.report.runs import Runs
from fuse.targets import reference

# Of target "reference".
ASKED = "target 'reference' asks for it"


class ReferenceKernel:
    """``why`` there is no kernel."""

    source: Path | None = None

    def __init__(self, spec: AttentionSpec, lse_dtype: str, why: str = ASKED) -> None:
        self._spec = spec
        self._lse_dtype: torch.dtype = getattr(torch, lse_dtype)
        self.runs = Runs("reference", why=why)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return reference.attention(self._spec, operands, sizes, "eager")

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention_with_lse(self._spec, operands, sizes, "eager")
        return out, lse.to(self._lse_dtype)


class ReferenceBackward:
    """As ReferenceKernel, of gradients."""

    def __init__(self, of: Gradient, why: str = ASKED) -> None:
        self._of = of
        self.runs = Runs("reference", why=why)

    def __call__(
        self, grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor,
        grad_lse: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        return reference.attention_backward(self._of.spec, grad_out, operands, sizes, self._of.wanted, "eager", grad_lse)


class ReferenceWeights:
    """As ReferenceKernel, of weights."""

    def __init__(self, spec: AttentionSpec, why: str = ASKED) -> None:
        self._spec = spec
        self.runs = Runs("reference", why=why)

    def __call__(self, operands: Sequence[Tensor], lse: Tensor, sizes: Sequence[int], heads: int) -> Tensor:
        return reference.weights(self._spec, operands, sizes, heads, "eager")


class ReferenceTileMap:
    """As ReferenceKernel, of maps."""

    def __init__(self, spec: TileMap, why: str = ASKED) -> None:
        self._spec = spec
        self.runs = Runs("reference", why=why)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return reference.tile_map(self._spec, operands, sizes)


@dataclass(frozen=True)
class ReferenceTarget:
    """The target "reference": none of its kernels is generated."""

    name: str = "reference"
    devices: None = None
    generated: bool = False
    suffix: str = ""
    tunable: bool = False
    late: bool = False

    def by_itself(self, device: torch.device) -> bool:
        return False

    def toolchain(self) -> str:
        return ""

    def lse_dtype(self, spec: AttentionSpec) -> str:
        return spec.lse_dtype

    def forward(self, spec: AttentionSpec) -> ReferenceKernel:
        return ReferenceKernel(spec, spec.lse_dtype)

    def backward(self, of: Gradient) -> ReferenceBackward:
        return ReferenceBackward(of)

    def tile_map(self, spec: TileMap) -> ReferenceTileMap:
        return ReferenceTileMap(spec)

    def weights(self, spec: AttentionSpec) -> ReferenceWeights:
        return ReferenceWeights(spec)

    def tile_size(self, spec: AttentionSpec) -> None:
        return None
