"""The backend of ``torch.compile(model, backend="fuse")``: options, then passes, then the inner compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch.fx import GraphModule

from fuse import channels, dump_sites, flex, inner, passes, targets
from fuse.contents import Buffers
from fuse.ops import opaque, warm
from fuse.ops.attention import parsed
from fuse.options import Options, resolve
from fuse.parallel.plan import Across, Plan
from fuse.passes.policy import Choose, Leave, leave_none
from fuse.passes.read.graph import State
from fuse.qualify import whole
from fuse.qualify.judge import Trial
from fuse.report import check, required
from fuse.report.reasons import InternalError, Slower
from fuse.report.site import Reading, Site
from fuse.targets import registry
from fuse.torch_private import DataDependentOutputException, DynamicOutputShapeException

log = logging.getLogger(__name__)
compiled: list[Reading] = []
"""Of every graph that was compiled in this process, in order; a recompile counts anew."""


def fuse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> Callable[..., Any]:
    """Fuses the attention in ``gm`` and hands all of it to the inner compiler.

    Dynamo calls a backend again where an inner compiler asked for a graph break, so sites are recorded only when that is done.
    """
    chosen = resolve(mode, options)
    original = check.keep(gm) if chosen.verify else None
    plain = check.keep(gm) if _may_be_left(chosen) and whole.is_little(gm, example_inputs) else None
    if is_read(example_inputs, chosen):
        call, reading = _tried(gm, example_inputs, chosen)
    else:
        call, reading = _compiled(gm, example_inputs, chosen, (), patterns=True), unread(example_inputs, chosen)
    built = tuple(_built(site, chosen.require) for site in reading.sites)
    compiled.append(replace(reading, sites=built))
    channels.tell(compiled[-1])
    if chosen.require:
        required.check(built)
    if plain is not None and any(site.recovered or isinstance(site.reason, Slower) for site in built):
        depends = f"{chosen.mode} {dict(chosen.inductor)}"
        call = whole.Contest(call, plain, depends, partial(_left_as_a_whole, compiled[-1]))
    return call if original is None else check.against(original, call, reading.sites)


def _may_be_left(chosen: Options) -> bool:
    """Whether a graph may run operator by operator after all: nobody asked for more than speed."""
    asked = (
        chosen.require or chosen.verify or chosen.disable or chosen.target != registry.AUTO or dump_sites.folder() is not None
    )
    return chosen.qualify != "never" and chosen.inner == "inductor" and not asked and chosen.context_parallel is None


def _left_as_a_whole(reading: Reading, why: str) -> None:
    """Tells that the graph of ``reading`` does not run as it was compiled."""
    sites = tuple(replace(s, recovered=False, reason=Slower(why), runs={}) if s.recovered else s for s in reading.sites)
    told = replace(reading, sites=sites)
    compiled[:] = [told if r is reading else r for r in compiled]
    channels.tell(told)


def _tried(gm: GraphModule, example_inputs: Sequence[Any], chosen: Options) -> tuple[Callable[..., Any], Reading]:
    """``gm`` with its attention fused, compiled; and again without the sites whose kernels turn out wrong or slower."""
    if chosen.qualify == "never" or chosen.context_parallel is not None:  # what would be left would be wrong
        return _fused(gm, example_inputs, chosen, leave_none)
    anew = chosen.qualify == "always" or dump_sites.folder() is not None
    trial, before = Trial(anew, chosen.target != registry.AUTO, chosen.inner == "inductor"), check.keep(gm)
    call, reading = _fused(gm, example_inputs, chosen, trial.leave)
    if trial.decide():
        call, reading = _fused(before, example_inputs, chosen, trial.leave)
    return call, replace(reading, sites=tuple(replace(site, measured=trial.measured(site)) for site in reading.sites))


def _fused(gm: GraphModule, example_inputs: Sequence[Any], chosen: Options, leave: Leave) -> tuple[Callable[..., Any], Reading]:
    reading = rewrite(gm, chosen, example_inputs, leave=leave)
    if chosen.require:
        required.check(reading.sites)  # before anything is built or compiled
    if chosen.context_parallel is not None:
        required.check_across_ranks(reading.sites)
    _prepare(gm, reading.sites, chosen.tune)  # builds run beside the inner compiler
    dump_sites.remember(gm, reading.sites)
    if chosen.qualify == "never":
        dump_sites.warn_of_unchecked(gm, reading.sites)
    return _compiled(gm, example_inputs, chosen, reading.sites, patterns=False), reading


def _prepare(gm: GraphModule, sites: Sequence[Site], tune: bool) -> None:
    found = [(site.spec, site.target, site.wanted) for site in sites if site.recovered and site.spec is not None]
    for spec, target, _ in found:
        targets.prepare(spec, target, tune)
    for site in sites:
        for matrix in site.weights:
            targets.prepare_weights(matrix, site.target)
    for spec, target, wanted in found:
        if any(wanted):
            targets.prepare_backward(spec, target, wanted, tune)
    wanted_of = {(spec, target): wanted for spec, target, wanted in found}
    late = {target for _, target, _ in found if registry.named(target).late}
    for call in warm.calls(gm) if late else ():
        if call.target in late:
            targets.beside(warm.compile_for, call, wanted_of.get((parsed(call.spec), call.target), ()))


def _compiled(
    gm: GraphModule, example_inputs: Sequence[Any], chosen: Options, sites: Sequence[Site], patterns: bool
) -> Callable[..., Any]:
    """What the inner compiler makes of ``gm``, again without derivatives that it cannot trace if that is what stopped it."""
    if chosen.inner == "inductor":
        flex.refuse_on_cpu(gm, sites)
    compiler = inner.compiler(chosen, patterns)
    try:
        return compiler(gm, example_inputs)  # type: ignore[no-any-return]
    except (DataDependentOutputException, DynamicOutputShapeException):
        if not opaque.hide(gm):
            raise
        return compiler(gm, example_inputs)  # type: ignore[no-any-return]


def chooser(chosen: Options) -> Choose:
    """Who computes attention of tensors on a device."""

    def choose(device: torch.device) -> str | None:
        target = registry.for_device(chosen.target, device)
        return None if target is None else target.name

    return choose


def is_read(example_inputs: Sequence[Any], chosen: Options) -> bool:
    """Whether fuse looks into a graph with such inputs; one without kernels for any of them is the inner compiler's, unless it
    is an error if there is attention in it.
    """
    if chosen.disable:
        return False
    devices = _devices(example_inputs)
    if chosen.require or chosen.context_parallel is not None or not devices or any(map(chooser(chosen), devices)):
        return True
    _warn_of_devices(frozenset(d.type for d in devices), chosen.target)
    return False


def unread(example_inputs: Sequence[Any], chosen: Options) -> Reading:
    """What is to be said of a graph that ``is_read`` denies."""
    types = sorted({d.type for d in _devices(example_inputs)})
    why = f"target {chosen.target!r} has no kernels for tensors on {', '.join(types)}"
    return Reading(unread="fuse is disabled" if chosen.disable else why)


def _devices(inputs: Sequence[Any]) -> set[torch.device]:
    return {x.device for x in inputs if isinstance(x, torch.Tensor)}


def rewrite(
    gm: GraphModule,
    chosen: Options,
    inputs: Sequence[Any],
    begins: State | None = None,
    inside: bool = True,
    leave: Leave = leave_none,
) -> Reading:
    """As ``passes.run``. A defect of a pass must not cost the user more than its fusions."""
    try:
        return passes.run(gm, chooser(chosen), inputs, begins, inside, leave, Buffers(), _across(chosen))
    except Exception as error:
        log.warning("a pass failed; attention in this graph may run unfused. Please report this.", exc_info=True)
        return Reading((Site(False, InternalError(f"{type(error).__name__}: {error}"), "", ""),))


def _across(chosen: Options) -> Across | None:
    """Where the sequence lies."""
    of = chosen.context_parallel
    return None if of is None else Across(Plan(of.group_name, of.balanced, of.way, (), ()), of.positionwise)


def _built(site: Site, gradients: bool) -> Site:
    """With its kernel, which is waited for; ``gradients``: with that of its gradients, too."""
    if not site.recovered or site.spec is None:
        return site
    targets.kernel(site.spec, site.target)
    for matrix in site.weights:
        targets.weights_kernel(matrix, site.target)
    if gradients and any(site.wanted):
        targets.backward_kernel(site.spec, site.target, site.wanted)
    return with_runs(site)


def with_runs(site: Site) -> Site:
    """With what is known now of the kernels that compute it; nothing is waited for."""
    if site.spec is None:
        return site
    runs = {**site.runs, **targets.running(site.spec, site.target, site.wanted, site.weights)}
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
