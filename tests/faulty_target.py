"""A target whose kernels are those of another with one fault: what qualification has to refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from problems import K, Q, op
from torch import Tensor

from fuse.ir.expr import Const, Expr, Load, apply, const
from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.report.runs import Runs
from fuse.targets.protocols import Backward, Kernel, MapKernel


def changed(root: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """``change`` applied to every node, operands first."""
    args = tuple(changed(a, change) for a in root.args)
    return change(root.with_args(args) if args else root)


def in_spec(change: Callable[[Expr], Expr]) -> Callable[[AttentionSpec], AttentionSpec]:
    return lambda spec: spec.mapped(lambda root: changed(root, change))


def one_more_key(n: Expr) -> Expr:
    if n is apply("le", K, Q, dtype="bool"):
        return apply("le", K, op("add", Q, 1), dtype="bool")
    return op("add", Q, 2) if n is op("add", Q, 1) else n


def another_scale(n: Expr) -> Expr:
    return const(n.value * 1.05, n.dtype) if isinstance(n, Const) and n.value == 0.25 and n.dtype == "float32" else n


def no_bias(n: Expr) -> Expr:
    return const(0.0, n.dtype) if isinstance(n, Load) and n.operand == 3 else n


def key_before(spec: AttentionSpec) -> AttentionSpec:
    *batch, k, d = spec.key.coords
    return replace(spec, key=Load(spec.key.dtype, 1, (*batch, op("maximum", op("sub", k, 1), 0), d)))


def first_group(spec: AttentionSpec) -> AttentionSpec:
    b, _, k, e = spec.value.coords
    return replace(spec, value=Load(spec.value.dtype, 2, (b, const(0), k, e)))


Results = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Fault:
    """What is changed of the spec that a kernel is made of, the sizes it is called with, its results, its gradients."""

    spec: Callable[[AttentionSpec], AttentionSpec] = lambda spec: spec
    keys: int = 0
    results: Callable[[Tensor, Tensor, Sequence[Tensor]], Results] = lambda out, lse, operands: (out, lse)
    gradients: Callable[[list[Tensor]], list[Tensor]] = lambda grads: grads


FAULTS = {
    "a mask off by one": Fault(in_spec(one_more_key)),
    "another scale": Fault(in_spec(another_scale)),
    "a bias that is not read": Fault(in_spec(no_bias)),
    "the key before": Fault(key_before),
    "the values of another group": Fault(first_group),
    "a tail that is dropped": Fault(keys=-1),
    "a last row that is not written": Fault(
        results=lambda out, lse, _: (out.index_fill(-2, torch.tensor(out.shape[-2] - 1), 0), lse)
    ),
    "a result that is not written": Fault(results=lambda out, lse, _: (torch.empty_like(out), lse)),
    "large scores that overflow": Fault(results=lambda out, lse, x: (out * (torch.nan if x[0].abs().max() > 20 else 1), lse)),
    "a log-sum-exp in base 2": Fault(results=lambda out, lse, _: (out, lse * 1.442695)),
    "a gradient without its factor": Fault(gradients=lambda grads: [grads[0] * 4, *grads[1:]]),
    "a gradient that is added twice": Fault(gradients=lambda grads: [*grads[:2], grads[2] * 2, *grads[3:]]),
    "a gradient of a bias that is not written": Fault(gradients=lambda grads: [*grads[:3], torch.zeros_like(grads[3])]),
}


@dataclass(frozen=True)
class FaultyKernel:
    kernel: Kernel
    fault: Fault
    batch: int

    source = Path("faulty.cpp")
    runs = Runs("kernel", source)

    def _sizes(self, sizes: Sequence[int]) -> list[int]:
        return [n + self.fault.keys * (i == self.batch + 1) for i, n in enumerate(sizes)]

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return self.forward(operands, sizes)[0]

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Results:
        return self.fault.results(*self.kernel.forward(operands, self._sizes(sizes)), operands)


@dataclass(frozen=True)
class FaultyBackward:
    kernel: Backward
    fault: Fault
    runs = Runs("kernel", Path("faulty.cpp"))

    def __call__(self, *args: Any) -> list[Tensor]:
        return self.fault.gradients(self.kernel(*args))


@dataclass(frozen=True)
class FaultyTarget:
    """Kernels of ``base`` with one fault."""

    base: Any
    fault: Fault
    name: str = "faulty"
    generated: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def forward(self, spec: AttentionSpec) -> Kernel:
        return FaultyKernel(self.base.forward(self.fault.spec(spec)), self.fault, spec.batch)

    def backward(self, of: Gradient) -> Backward:
        return FaultyBackward(self.base.backward(of), self.fault)

    def tile_map(self, spec: TileMap) -> MapKernel:
        found: MapKernel = self.base.tile_map(spec)
        return found
