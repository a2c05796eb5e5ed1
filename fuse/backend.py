"""The backend of ``torch.compile(model, backend="fuse")``: options, then passes, then the inner compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import GraphModule

from fuse import flex, inner, passes, targets
from fuse.ops import opaque, warm
from fuse.ops.attention import parsed
from fuse.options import Options, resolve
from fuse.passes.policy import Leave, leave_none
from fuse.passes.read.graph import State
from fuse.qualify.judge import Trial
from fuse.report import check
from fuse.report.reasons import InternalError
from fuse.report.site import Reading, Site
from fuse.targets import registry
from fuse.targets.target import Target

log = logging.getLogger("fuse")
compiled: list[Reading] = []
"""Of every graph that was compiled in this process, in order; a recompile counts anew."""


def fuse(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Fuses the attention in ``gm`` and hands all of it to the inner compiler.

    Dynamo calls a backend again where an inner compiler asked for a graph break, so sites are recorded only when that is done.
    """
    chosen = resolve(mode, options)
    original = check.keep(gm) if chosen.verify else None
    target = target_of(example_inputs, chosen)
    if target is None:
        call, reading = inner.compiler(chosen, patterns=True)(gm, example_inputs), _unread(example_inputs, chosen)
    else:
        call, reading = _tried(gm, example_inputs, chosen, target)
    compiled.append(replace(reading, sites=tuple(map(_built, reading.sites))))
    return call if original is None else check.against(original, call, reading.sites)


def _tried(
    gm: GraphModule, example_inputs: Sequence[Any], chosen: Options, target: Target
) -> tuple[Callable[..., Any], Reading]:
    """``gm`` with its attention fused, compiled; and again without the sites whose kernels turn out wrong or slower."""
    if chosen.qualify == "never":
        return _fused(gm, example_inputs, chosen, target, leave_none)
    trial, before = Trial(chosen.qualify == "always"), check.keep(gm)
    call, reading = _fused(gm, example_inputs, chosen, target, trial.leave)
    return _fused(before, example_inputs, chosen, target, trial.leave) if trial.decide() else (call, reading)


def _fused(
    gm: GraphModule, example_inputs: Sequence[Any], chosen: Options, target: Target, leave: Leave
) -> tuple[Callable[..., Any], Reading]:
    reading = rewrite(gm, target, example_inputs, leave=leave)
    _prepare(gm, reading.sites, target, chosen.tune)  # builds run beside the inner compiler
    if chosen.inner == "inductor":
        flex.refuse_training(gm, reading.sites)
    return _compiled(gm, example_inputs, inner.compiler(chosen, patterns=False)), reading


def _prepare(gm: GraphModule, sites: Sequence[Site], target: Target, tune: bool) -> None:
    specs = [(site.spec, site.wanted) for site in sites if site.recovered and site.spec is not None]
    targets.prepare((spec for spec, _ in specs), target.name, tune)
    for spec, wanted in specs:
        if any(wanted):
            targets.prepare_backward(spec, target.name, wanted, tune)
    if target.late:
        for call in warm.calls(gm):
            targets.beside(warm.compile_for, call, dict(specs).get(parsed(call.spec), ()))


def _compiled(gm: GraphModule, example_inputs: Sequence[Any], compiler: Callable[..., Any]) -> Callable[..., Any]:
    """What the inner compiler makes of ``gm``, again without derivatives that it cannot trace if that is what stopped it."""
    try:
        return compiler(gm, example_inputs)  # type: ignore[no-any-return]
    except (DataDependentOutputException, DynamicOutputShapeException):
        if not opaque.hide(gm):
            raise
        return compiler(gm, example_inputs)  # type: ignore[no-any-return]


def target_of(example_inputs: Sequence[Any], chosen: Options) -> Target | None:
    """Who runs what is fused in a graph with such inputs; None for one that fuse does not read: it is the inner compiler's."""
    if chosen.disable:
        return None
    devices = _devices(example_inputs)
    target = registry.for_devices(chosen.target, set(devices))
    if target is None:
        _warn_of_devices(frozenset(devices), chosen.target)
    return target


def _unread(example_inputs: Sequence[Any], chosen: Options) -> Reading:
    return Reading(unread=why_unread(example_inputs, chosen))


def why_unread(example_inputs: Sequence[Any], chosen: Options) -> str:
    """Why ``target_of`` gives nobody."""
    if chosen.disable:
        return "fuse is disabled"
    return f"target {chosen.target!r} has no kernels for tensors on {', '.join(_devices(example_inputs))}"


def _devices(inputs: Sequence[Any]) -> list[str]:
    return sorted({x.device.type for x in inputs if isinstance(x, torch.Tensor)})


def rewrite(
    gm: GraphModule,
    target: Target,
    inputs: Sequence[Any],
    begins: State | None = None,
    inside: bool = True,
    leave: Leave = leave_none,
) -> Reading:
    """As ``passes.run``. A defect of a pass must not cost the user more than its fusions."""
    try:
        reading = passes.run(gm, target.name, inputs, begins, inside, leave)
    except Exception as error:
        log.warning("a pass failed; attention in this graph may run unfused. Please report this.", exc_info=True)
        return Reading((Site(False, InternalError(f"{type(error).__name__}: {error}"), "", ""),))
    return replace(reading, sites=tuple(replace(site, target=target.name) for site in reading.sites))


def _built(site: Site) -> Site:
    """With its kernel, which is waited for."""
    if not site.recovered or site.spec is None:
        return site
    targets.kernel(site.spec, site.target)
    return with_runs(site)


def with_runs(site: Site) -> Site:
    """With what is known now of the kernels that compute it; nothing is waited for."""
    if site.spec is None:
        return site
    runs = {**site.runs, **targets.running(site.spec, site.target, site.wanted)}
    file = runs["forward"].file if "forward" in runs else None
    return replace(site, runs=runs, kernels={} if file is None else {site.target: file})


@cache
def _warn_of_devices(devices: frozenset[str], target: str) -> None:
    others = registry.others_for(devices)
    log.warning(
        "graphs with tensors on %s run without fuse: target %r has kernels for %s.%s",
        ", ".join(sorted(devices)), target, " and ".join(registry.devices_of(target)),
        f" For those there is target {' or '.join(map(repr, others))} to try." if others else "",
    )  # fmt: skip
