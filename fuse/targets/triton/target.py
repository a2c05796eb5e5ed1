"""The target "triton": kernels for GPUs. Triton is imported when the first one is made: it is not there for every platform."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.targets.cache import BuildFailed
from fuse.targets.fallback import KernelOrElse, OrElse
from fuse.targets.protocols import Backward, Finding, Kernel, MapKernel, WeightsKernel
from fuse.targets.standin import ReferenceBackward, ReferenceKernel, ReferenceTileMap, ReferenceWeights
from fuse.targets.triton import NAME, SUFFIX
from fuse.targets.triton.plan import ARCHITECTURES, described, plan_triton

# For tests, Triton's interpreter takes tensors on the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_GPU = frozenset({"cuda"})
_NVIDIA, _AMD = (75, 121), ("gfx90a", "gfx942", "gfx950")  # architectures: from … to, and by name


@dataclass(frozen=True)
class TritonTarget:
    name: str = NAME
    devices: frozenset[str] = _GPU | {"cpu"} if _INTERPRETED else _GPU
    generated: bool = True
    suffix: str = SUFFIX
    tunable: bool = True
    late: bool = not _INTERPRETED

    def by_itself(self, device: torch.device) -> bool:
        """On a GPU of a kind that kernels are compiled for in tests, where Triton is installed."""
        return device.type in _GPU and find_spec("triton") is not None and is_known(device)

    def toolchain(self) -> str:
        return ""

    def lse_dtype(self, spec: AttentionSpec) -> str:
        return spec.lse_dtype

    def forward(self, spec: AttentionSpec) -> Kernel:
        with _installed():
            from fuse.targets.triton.function import REFUSALS
            from fuse.targets.triton.launch import TritonKernel

        return KernelOrElse(TritonKernel(spec), partial(ReferenceKernel, spec, spec.lse_dtype), REFUSALS)

    def backward(self, of: Gradient) -> Backward:
        with _installed():
            from fuse.targets.triton.function import REFUSALS
            from fuse.targets.triton.launch_backward import TritonBackward

        return OrElse(TritonBackward(of.spec, of.wanted), partial(ReferenceBackward, of), REFUSALS, "backward")

    def weights(self, spec: AttentionSpec) -> WeightsKernel:
        with _installed():
            from fuse.targets.triton.function import REFUSALS
            from fuse.targets.triton.launch_weights import TritonWeights

        return OrElse(TritonWeights(spec), partial(ReferenceWeights, spec), REFUSALS, "weights")

    def tile_map(self, spec: TileMap) -> MapKernel:
        with _installed():
            from fuse.targets.triton.function import REFUSALS
            from fuse.targets.triton.launch_tile_map import TritonTileMap

        return OrElse(TritonTileMap(spec), partial(ReferenceTileMap, spec), REFUSALS, "tile map")

    def forward_source(self, spec: AttentionSpec) -> str:
        with _installed():
            from fuse.targets.triton.module import current_architecture
            from fuse.targets.triton.render import render_triton

        return render_triton(spec, plan_triton(spec, current_architecture()))

    def backward_source(self, of: Gradient) -> str:
        with _installed():
            from fuse.targets.triton.module import current_architecture
            from fuse.targets.triton.render_backward import render_backward

        return render_backward(of.spec, of.wanted, described(of.spec, current_architecture()))

    def tile_map_source(self, spec: TileMap) -> str:
        with _installed():
            from fuse.targets.triton.render_tile_map import render_tile_map_triton

        return render_tile_map_triton(spec)

    def weights_source(self, spec: AttentionSpec) -> str:
        with _installed():
            from fuse.targets.triton.module import current_architecture
            from fuse.targets.triton.render_weights import render_weights

        return render_weights(spec, plan_triton(spec, current_architecture()))

    def forward_of(self, spec: AttentionSpec, source: Path) -> Kernel:
        with _installed():
            from fuse.targets.triton.launch import kernel_of

        return kernel_of(spec, source)

    def backward_of(self, of: Gradient, source: Path) -> Backward:
        with _installed():
            from fuse.targets.triton.launch_backward import TritonBackward
            from fuse.targets.triton.module import from_file

        return TritonBackward(of.spec, of.wanted, from_file(source))

    def tile_map_of(self, spec: TileMap, source: Path) -> MapKernel:
        with _installed():
            from fuse.targets.triton.launch_tile_map import TritonTileMap
            from fuse.targets.triton.module import from_file

        return TritonTileMap(spec, from_file(source))

    def examine(self) -> list[Finding]:
        if not torch.cuda.is_available():
            return [Finding("GPU", "none that torch can use: nothing here is missing without one")]
        found = [_gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
        installed = find_spec("triton") is not None
        remedy = "" if installed else "Install it: pip install 'torch-fuse[triton]'"
        return [*found, Finding("Triton", metadata.version("triton") if installed else "not installed", remedy)]

    def tile_size(self, spec: AttentionSpec) -> tuple[int, int]:
        try:
            from fuse.targets.triton.module import current_architecture
        except ImportError:
            return _block(spec, "sm_80")
        return _block(spec, current_architecture().name)


def is_known(device: torch.device) -> bool:
    try:
        found = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError):  # there is none: a graph may be traced without
        return False
    if torch.version.hip is not None:
        return str(found.gcnArchName).partition(":")[0] in _AMD
    return _NVIDIA[0] <= 10 * int(found.major) + int(found.minor) <= _NVIDIA[1]


def _gpu(device: torch.device) -> Finding:
    name = f"{device}: {torch.cuda.get_device_name(device)}"
    if is_known(device):
        return Finding("GPU", name)
    remedy = 'To try it all the same: options={"target": "triton"}'
    return Finding("GPU", f"{name}, for which kernels are not compiled in tests, so that attention is left alone", remedy)


@contextmanager
def _installed() -> Iterator[None]:
    """What is imported inside needs Triton. Raises BuildFailed, with how to get it."""
    try:
        yield
    except ImportError as error:
        raise BuildFailed(f"{error}. Target {NAME!r} needs Triton: pip install 'torch-fuse[triton]'") from error


def _block(spec: AttentionSpec, architecture: str) -> tuple[int, int]:
    chosen = plan_triton(spec, ARCHITECTURES[architecture])
    return chosen.block_q, chosen.block_k
