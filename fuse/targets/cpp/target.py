"""The target "cpp": C++ kernels for CPUs, built by the compiler that Inductor needs, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.targets.cpp import NAME, SUFFIX, op, packaged
from fuse.targets.cpp.compiler import instruction_set, toolchain
from fuse.targets.cpp.examine import examine
from fuse.targets.cpp.launch import CppKernel, CppTileMap, build, build_file, build_tile_map, rendered, rendered_tile_map
from fuse.targets.cpp.launch_backward import CppBackward, build_backward, rendered_backward
from fuse.targets.cpp.launch_weights import CppWeights, build_weights, rendered_weights
from fuse.targets.cpp.plan import lse_dtype, plan
from fuse.targets.protocols import Finding


@dataclass(frozen=True)
class CppTarget:
    name: str = NAME
    devices: frozenset[str] = frozenset({"cpu"})
    generated: bool = True
    suffix: str = SUFFIX
    tunable: bool = False
    late: bool = False

    def by_itself(self, device: torch.device) -> bool:
        return True

    def toolchain(self) -> str:
        return toolchain()

    def shorten_calls(self) -> None:
        op.load()

    def caller(self, operator: str, text: str, slow: Callable[..., Any]) -> Callable[..., Any]:
        return op.caller(operator, text, self.name, slow)

    def lse_dtype(self, spec: AttentionSpec) -> str:
        return lse_dtype(spec)

    def forward(self, spec: AttentionSpec) -> CppKernel:
        return CppKernel(spec, build(spec))

    def backward(self, of: Gradient) -> CppBackward:
        return CppBackward(of.spec, of.wanted, build_backward(of.spec, of.wanted))

    def weights(self, spec: AttentionSpec) -> CppWeights:
        return CppWeights(spec, build_weights(spec))

    def tile_map(self, spec: TileMap) -> CppTileMap:
        return CppTileMap(spec, build_tile_map(spec))

    def forward_source(self, spec: AttentionSpec) -> str:
        return rendered(spec).text

    def backward_source(self, of: Gradient) -> str:
        return rendered_backward(of.spec, of.wanted).text

    def tile_map_source(self, spec: TileMap) -> str:
        return rendered_tile_map(spec).text

    def weights_source(self, spec: AttentionSpec) -> str:
        return rendered_weights(spec).text

    def forward_of(self, spec: AttentionSpec, source: Path) -> CppKernel:
        return CppKernel(spec, build_file(source))

    def backward_of(self, of: Gradient, source: Path) -> CppBackward:
        return CppBackward(of.spec, of.wanted, build_file(source))

    def tile_map_of(self, spec: TileMap, source: Path) -> CppTileMap:
        return CppTileMap(spec, build_file(source))

    def package(self, specs: Mapping[str, AttentionSpec], folder: Path) -> Path:
        return packaged.write(specs, folder)

    def examine(self) -> list[Finding]:
        return examine()

    def tile_size(self, spec: AttentionSpec) -> tuple[int, int]:
        chosen = plan(spec, instruction_set())
        return chosen.vectors * chosen.width, chosen.block_k
