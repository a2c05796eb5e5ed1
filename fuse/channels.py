"""What fuse says in torch's own channels of every graph that it compiled.

TORCH_LOGS=fuse          a line for each site, and for each kernel that is built
TORCH_LOGS=fuse_sites    what there is to know of each site
TORCH_LOGS=fuse_kernels  the sources of kernels
TORCH_TRACE=folder       both in the structured trace, of which tlparse makes files: fuse_sites, and one for each kernel
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch_fuse_logs
from fuse.kernel.names import kernel_name
from fuse.report.listing import Listing, listings
from fuse.report.runs import brief
from fuse.report.site import Reading, Site
from fuse.torch_private import artifact_logger, is_traced, trace_artifact

torch_fuse_logs.register()  # where torch has not asked for it: an older one, or TORCH_DEVICE_BACKEND_AUTOLOAD=0
log = logging.getLogger(__name__)
_sites, _kernels = (artifact_logger(__name__, name) for name in torch_fuse_logs.ARTIFACTS)


def tell(reading: Reading) -> None:
    """Says what became of a graph, to whoever listens. Never fails."""
    try:
        _tell(reading)
    except Exception:  # what is said of a model must not cost the model
        log.debug("a graph's sites could not be told", exc_info=True)


def _tell(reading: Reading) -> None:
    if log.isEnabledFor(logging.INFO):
        for line in _lines(reading):
            log.info("%s", line)
    if _sites.isEnabledFor(logging.DEBUG):
        for site in reading.sites:
            _sites.debug("%s", "\n".join([_line(site), *(f"    {line}" for line in _details(site))]))
    if _kernels.isEnabledFor(logging.DEBUG):
        for name, listing in _listed(reading.sites):
            _kernels.debug("%s, %s\n%s", name, listing.about, listing.text)
    if is_traced():
        trace_artifact("fuse_sites", "json", lambda: json.dumps([*map(_data, reading.sites)], indent=1))
        for name, listing in _listed(reading.sites):
            trace_artifact(f"fuse_kernel_{name}", "string", partial(str, listing.text))


def _lines(reading: Reading) -> Iterator[str]:
    if reading.unread:
        yield f"a graph was not looked into: {reading.unread}"
    yield from map(_line, reading.sites)


def _line(site: Site) -> str:
    where = f"{site.where} {site.module}".strip()
    if site.reason is not None:
        return f"{where}: left as it was: {site.reason.name}: {site.reason}. To fuse it: {site.reason.unblock}"
    runs = "; ".join(f"{part} by {brief(str(runs))}" for part, runs in site.runs.items())
    return f"{where}: {'fused' if site.fused else 'not fused'}, mask {site.mask or 'none'}: {runs}"


def _details(site: Site) -> Iterator[str]:
    yield from (f"called from {frame} in {frame.function}" for frame in site.frames)
    if site.spec is not None:
        yield from str(site.spec).splitlines()
        yield "operands: " + ", ".join(f"{i} is {name}" for i, name in site.names.items())
        yield "sizes: " + ", ".join(f"{name} = {n}" for name, n in zip(site.spec.symbols, site.sizes, strict=False))
    if site.measured:
        yield f"measured: {site.measured}"


def _data(site: Site) -> dict[str, Any]:
    reason, spec = site.reason, site.spec
    return {
        "where": site.where, "module": site.module, "fused": site.fused, "target": site.target, "mask": site.mask,
        "reason": None if reason is None else {"name": reason.name, "text": str(reason), "to_fuse_it": reason.unblock},
        "computes": [] if spec is None else str(spec).splitlines(), "operands": site.names,
        "sizes": {} if spec is None else dict(zip(spec.symbols, site.sizes, strict=False)), "measured": site.measured,
        "runs": {part: str(runs) for part, runs in site.runs.items()}, "calls": [*map(str, site.frames)],
        "spec": None if spec is None else json.loads(spec.to_json()),
    }  # fmt: skip


_PARTS = {"result": "", "gradients": "backward", "map of the mask's tiles": "tile_map"}


def _listed(sites: Sequence[Site]) -> Iterator[tuple[str, Listing]]:
    """Kernels by what they compute, each text once, with a number from the second of a name on."""
    count: dict[str, int] = {}
    texts = set()
    for site in sites:
        for listing in listings(site):
            if site.spec is not None and listing.text not in texts:
                texts.add(listing.text)
                name = kernel_name(site.spec, _PARTS[listing.what])
                count[name] = count.get(name, 0) + 1
                yield (name if count[name] == 1 else f"{name}_{count[name]}"), listing
