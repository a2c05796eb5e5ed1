"""A report as plain data: all that is known, for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fuse.report.listing import Listing, listings
from fuse.report.report import Report, skipped
from fuse.report.site import Site
from fuse.report.subject import surroundings
from fuse.targets.manifest import digest


def of(report: Report) -> dict[str, Any]:
    """
    made, by, on, with, model, inputs  when, by which command, on which machine, with which versions; the model and its call
    sites    each with what computes it; its ``sources`` are keys of ``kernels``
    kernels  sources, each once: what it computes ("result", "gradients", "map of the mask's tiles"), and whether it is built
    """
    shown: dict[object, tuple[Listing, ...]] = {}
    for site in report.sites:
        if _kernels_of(site) not in shown:  # layers share theirs
            shown[_kernels_of(site)] = listings(site)
    return {
        **dict(surroundings()), **asdict(report.subject), "fused": report.fused, "recovered": report.recovered,
        "sites": [{**_site(site), "sources": {x.what: _key(x) for x in shown[_kernels_of(site)]}} for site in report.sites],
        "others": [asdict(other) for other in report.others],
        "graphs": report.graphs, "unread": report.unread, "note": report.note,
        "kernels": {_key(x): _kernel(x) for found in shown.values() for x in found},
    }  # fmt: skip


def _kernels_of(site: Site) -> object:
    return site.spec, site.target, site.wanted, tuple(site.runs.items())


def _key(listing: Listing) -> str:
    return digest(listing.text.encode())


def _kernel(listing: Listing) -> dict[str, str]:
    return {"computes": listing.what, "about": listing.about, "language": listing.language, "text": listing.text}


def _site(site: Site) -> dict[str, Any]:
    reason, share, spec = site.reason, skipped(site), site.spec
    return {
        "fused": site.fused, "recovered": site.recovered, "where": site.where, "module": site.module,
        "calls": [asdict(frame) for frame in site.frames],
        "formula": site.formula, "mask": site.mask,
        "reason": None if reason is None else {"name": reason.name, "text": str(reason), "unblock": reason.unblock},
        "skipped": None if share is None else {"share": share.skipped, "exact": share.exact},
        "sizes": {} if spec is None else dict(zip(spec.symbols, site.sizes, strict=True)),
        "operands": _operands(site), "relies": list(site.relies), "target": site.target, "measured": site.measured,
        "kernels": {target: str(path) for target, path in site.kernels.items()},
        "runs": {
            part: {"by": runs.by, "file": None if runs.file is None else str(runs.file), "why": runs.why}
            for part, runs in site.runs.items()
        },
        "spec": None if spec is None else json.loads(spec.to_json()),
        "passes": {name: str(made) for name, made in site.steps},
    }  # fmt: skip


def _operands(site: Site) -> list[dict[str, Any]]:
    """The tensors that the kernel reads, in the spec's order."""
    wanted = site.wanted or (False,) * len(site.names)
    return [{"name": site.names.get(n, ""), "gradient": asked} for n, asked in enumerate(wanted)]
