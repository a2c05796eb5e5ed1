"""FUSE_DUMP: which sites of the user's source the kernels in its folder are for, and how their operands lie in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.fx import GraphModule

from fuse.errors import FuseError
from fuse.ops import warm
from fuse.ops.attention import parsed
from fuse.ops.warm import ExpectedCall
from fuse.qualify.judge import edited_kernels
from fuse.qualify.problem import map_used, of_map
from fuse.report.site import Site
from fuse.settings import settings
from fuse.targets import dump_index
from fuse.targets.dump_index import Call, Layout


def folder() -> Path | None:
    """The folder; None where it, or that of the cache, is none: whoever builds a kernel says so."""
    try:
        return settings().dump
    except FuseError:
        return None


def remember(gm: GraphModule, sites: Sequence[Site]) -> None:
    """The calls of a graph whose sites were replaced; nothing where FUSE_DUMP is not set."""
    if (dump := folder()) is not None and sites:
        found = [each for site, call in _called(gm, sites) for each in _calls(site, call)]
        dump_index.remember(dump, found)


def warn_of_unchecked(gm: GraphModule, sites: Sequence[Site]) -> None:
    """Of edited kernels that run in a graph whose kernels nobody checks."""
    if folder() is not None:
        for site, call in _called(gm, sites):
            for file in edited_kernels(call, site.wanted):
                warnings.warn(f"the edited kernel {file} runs unchecked: qualify='never'", RuntimeWarning, stacklevel=2)


def _called(gm: GraphModule, sites: Sequence[Site]) -> Iterator[tuple[Site, ExpectedCall]]:
    """Sites whose calls are known."""
    expected = {(parsed(call.spec), call.target, call.sizes): call for call in warm.calls(gm)}
    for site in sites:
        if site.spec is not None and (call := expected.get((site.spec, site.target, site.sizes))) is not None:
            yield site, call


def _calls(site: Site, call: ExpectedCall) -> Iterator[Call]:
    """Of the result, of the gradients, and of the map of the mask's tiles."""
    spec, device = parsed(call.spec), call.device.type
    operands = tuple(Layout(str(t.dtype).removeprefix("torch."), tuple(t.shape), t.stride()) for t in call.operands)
    names = tuple(site.names.get(i, "") for i in range(len(operands)))
    for wanted in {(), site.wanted if any(site.wanted) else ()}:
        yield Call(spec.to_json(), wanted, device, call.sizes, operands, site.where, site.module, names)
    if (use := map_used(spec)) is not None:
        _, sizes = of_map(use, spec, call.operands, call.sizes)
        own = tuple(operands[i] for i in use.operands)
        called = tuple(names[i] for i in use.operands)
        yield Call(use.tile_map.to_json(), (), device, tuple(sizes), own, site.where, site.module, called)
