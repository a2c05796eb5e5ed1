"""Programs compiled together, so that their C++ kernels are built in a few libraries; then called and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from together import narrow, together
from torch import Tensor
from torch.fx import GraphModule

import fuse
from fuse import backend, targets
from fuse.ir.spec import AttentionSpec
from fuse.report.site import Site
from fuse.targets import reference, registry
from fuse.targets.standin import ReferenceKernel, ReferenceTarget
from fuzz.judge import called, judge
from fuzz.program import Program


class Held(Exception):
    """Kernels are not built yet."""


@dataclass
class Compiled:
    """A program under fuse. Calls raise Held as long as it is held; ``sites``: of all graphs that were compiled for it."""

    program: Program
    target: str
    held: bool = True
    sites: list[Site] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.function = torch.compile(self.program.function(), backend=self._backend(), dynamic=self.program.dynamic)

    def compile(self) -> None:
        """As far as the kernels, which are not waited for where many are built together."""
        with suppress(Exception), torch.set_grad_enabled(self.program.training):
            self.function(*_asking(self.program))

    @property
    def fused(self) -> bool:
        """All that it was to fuse is computed by kernels, or by the reference if that was asked for."""
        kernels = registry.named(self.target).generated
        return (
            any(site.recovered for site in self.sites)
            and not any(site.reason for site in self.sites)
            and not (kernels and any(backend.with_runs(site).by_reference for site in self.sites))
        )

    def _backend(self) -> Callable[..., Any]:
        def compiler(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            call = backend.fuse(gm, example_inputs, options={"inner": self.program.inner, "target": self.target})
            sites = backend.compiled[-1].sites
            self.sites += sites
            for site in sites:
                _wait(site)

            def run(*args: Any) -> Any:
                if self.held:
                    raise Held
                return call(*args)

            return run

        compiler.__module__ = backend.__name__  # fuse.flex lets train what fuse's backend compiles
        return compiler


def _asking(program: Program) -> list[Any]:
    inputs = program.drawn(program.lengths[0])
    wanted = [isinstance(x, Tensor) and x.is_floating_point() and program.training for x in inputs]
    return [x.requires_grad_().clone() if w else x for x, w in zip(inputs, wanted, strict=True)]


def _wait(site: Site) -> None:
    if site.recovered and site.spec is not None:
        targets.kernel(site.spec, site.target)
        if any(site.wanted):
            targets.backward_kernel(site.spec, site.target, site.wanted)
        if (of_map := targets._map_of(site.spec)) is not None:
            targets.map_kernel(of_map, site.target)


@dataclass(frozen=True)
class Verdict:
    """``wrong``: "" where nothing is; ``masked``: a mask was recovered."""

    program: Program
    target: str
    wrong: str
    fused: bool
    masked: bool


def verdicts(programs: Sequence[Program], target: str, narrowed: bool = True) -> list[Verdict]:
    """``narrowed``: C++ kernels have blocks of one vector only, which is quicker to build; see ``together.narrow``."""
    torch._dynamo.reset()
    fuse.reset()
    targets.reset()
    kernels = target == "cpp"
    with narrow() if kernels and narrowed else nullcontext(), checked_masks():
        compiled = [Compiled(program, target) for program in programs]
        with together() if kernels else nullcontext():
            for each in compiled:
                each.compile()
        return [_verdict(each) for each in compiled]


def _verdict(compiled: Compiled) -> Verdict:
    program, wrong = compiled.program, ""
    compiled.held = False
    for lengths in program.lengths:
        exact = called(program.function(wide=True, plain=True), program, lengths, wide=True)
        eager = called(program.function(plain=True), program, lengths)
        found = judge(program, exact, eager, called(compiled.function, program, lengths))
        if found and program.inner == "inductor":  # is it Inductor that is wrong of this result, with fuse and without?
            alone = torch.compile(program.function(), backend="inductor", dynamic=program.dynamic)
            others = Compiled(replace(program, inner="eager"), compiled.target, held=False).function
            theirs, ours = (judge(program, exact, eager, called(f, program, lengths)) for f in (alone, others))
            found = "" if _about(theirs) == _about(found) and not ours else found
        wrong = wrong or found
    return Verdict(program, compiled.target, wrong, compiled.fused, any(site.mask for site in compiled.sites))


def _about(wrong: str) -> str:
    return wrong.partition(":")[0]


# ----------------------------------------------------------------------------------------------- what a mask says is true


class _Checked(ReferenceKernel):
    """The reference visits every entry, whatever a mask claims: so the claims are checked on the operands of each call."""

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        reference.check_mask(self._spec, operands, sizes)
        return super().__call__(operands, sizes)

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        reference.check_mask(self._spec, operands, sizes)
        return super().forward(operands, sizes)


@dataclass(frozen=True)
class _CheckedTarget(ReferenceTarget):
    def forward(self, spec: AttentionSpec) -> ReferenceKernel:
        return _Checked(spec, spec.lse_dtype)


@contextmanager
def checked_masks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._targets, "reference", _CheckedTarget())
        yield
