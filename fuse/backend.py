"""The backend of ``torch.compile(model, backend="fuse")``: options, then passes, then the inner compiler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import GraphModule

from fuse import inner, op, opaque, passes, runtime, verify
from fuse.options import Options, resolve
from fuse.runtime import warm
from fuse.site import Site

log = logging.getLogger("fuse")
compiled_sites: list[Site] = []
"""Of every graph that was compiled in this process, in order; a recompile counts anew."""

# Other subclasses (DTensor, nested tensors, a user's own) have a say in what each op does, so that no reading is a proof.
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)


# Where kernels run. Triton's interpreter, for tests, takes tensors on the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_GPU = frozenset({"cuda"})
_DEVICES = {"auto": frozenset({"cpu"}), "cpp": frozenset({"cpu"}), "triton": _GPU | {"cpu"} if _INTERPRETED else _GPU}


def fuse(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Fuses the attention in ``gm`` and hands all of it to the inner compiler.

    Dynamo calls a backend again where an inner compiler asked for a graph break, so sites are recorded only when that is done.
    """
    chosen = resolve(mode, options)
    original = verify.keep(gm) if chosen.verify else None
    sites = rewrite(gm, example_inputs, chosen)
    specs = [(site.spec, site.wanted) for site in sites if site.recovered and site.spec is not None]
    runtime.prepare((spec for spec, _ in specs), chosen.target, chosen.tune)  # builds run beside the inner compiler
    for spec, wanted in specs:
        if any(wanted):
            runtime.prepare_backward(spec, chosen.target, wanted, chosen.tune)
    if chosen.target == "triton" and not _INTERPRETED:
        for call in warm.calls(gm):
            runtime.beside(warm.compile_for, call, dict(specs).get(op.parsed(call.spec), ()))
    compiled = _compiled(gm, example_inputs, chosen)
    compiled_sites.extend(_built(site, chosen.target) for site in sites)
    return compiled if original is None else verify.against(original, compiled, sites)


def _compiled(gm: GraphModule, example_inputs: Sequence[Any], chosen: Options) -> Callable[..., Any]:
    """What the inner compiler makes of ``gm``, again without derivatives that it cannot trace if that is what stopped it."""
    compiler = inner.compiler(chosen, patterns=not looks_at(example_inputs, chosen))
    try:
        compiled = compiler(gm, example_inputs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        if not opaque.hide(gm):
            raise
        compiled = compiler(gm, example_inputs)
    return compiled  # type: ignore[no-any-return]


def looks_at(example_inputs: Sequence[Any], chosen: Options) -> bool:
    """Whether fuse reads a graph with such inputs at all; one that it does not read is the inner compiler's alone."""
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    if chosen.disable or any(type(x) not in PLAIN for x in tensors):
        return False
    devices = {x.device.type for x in tensors}
    if devices - _DEVICES.get(chosen.target, devices):
        _warn_of_device(", ".join(sorted(devices)), chosen.target)
        return False
    return True


def rewrite(gm: GraphModule, example_inputs: Sequence[Any], chosen: Options) -> list[Site]:
    """Rewrites ``gm`` in place. A defect of a pass must not cost the user more than its fusions."""
    if not looks_at(example_inputs, chosen):
        return []
    try:
        return passes.run(gm, chosen)
    except Exception:
        log.warning("a pass failed; attention in this graph may run unfused. Please report this.", exc_info=True)
        return []


def _built(site: Site, target: str) -> Site:
    """With its kernel, which is waited for."""
    if not site.recovered or site.spec is None:
        return site
    runtime.kernel(site.spec, target)
    return with_runs(replace(site, target=target))


def with_runs(site: Site) -> Site:
    """With what is known now of the kernels that compute it; nothing is waited for."""
    if not site.target or site.spec is None:
        return site
    runs = {**site.runs, **runtime.running(site.spec, site.target, site.wanted)}
    file = runs["forward"].file if "forward" in runs else None
    return replace(site, runs=runs, kernels={} if file is None else {"cpp" if site.target == "auto" else site.target: file})


@cache
def _warn_of_device(devices: str, target: str) -> None:
    log.warning(
        "graphs with tensors on %s run without fuse: target %r has kernels for %s. "
        "For GPUs there is target \"triton\" to try, which has not been measured yet.",
        devices, target, " and ".join(sorted(_DEVICES[target])),
    )  # fmt: skip
