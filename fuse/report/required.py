"""``require``: what is not computed by generated kernels, and why, as an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuse.errors import NotAcrossRanks, NotFused
from fuse.report.paths import merge_paths
from fuse.report.runs import brief
from fuse.report.site import Site


@dataclass(frozen=True)
class Unfused:
    """Sites at one place, which run without a kernel for one reason. ``unblock``: what would change that, or ""."""

    sites: tuple[Site, ...]
    why: str
    unblock: str

    def __str__(self) -> str:
        site, modules = self.sites[0], merge_paths([site.module for site in self.sites])
        place = f"{site.where} {modules}".strip() or "unknown place"
        many = f" ({len(self.sites)} sites)" if len(self.sites) > 1 else ""
        return f"{place}{many}: {self.why}" + (f"\n    to fuse it: {self.unblock}" if self.unblock else "")


def unfused(sites: Sequence[Site]) -> list[Unfused]:
    found: dict[tuple[str, str, str], list[Site]] = {}
    for site in sites:
        if blocked := _blocked(site):
            found.setdefault((site.where, *blocked), []).append(site)
    return [Unfused(tuple(alike), why, unblock) for (_, why, unblock), alike in found.items()]


def check(sites: Sequence[Site]) -> None:
    """Raises NotFused for attention that no kernel computes, in the result or in its gradients. Without any all is well."""
    if found := unfused(sites):
        count = sum(len(x.sites) for x in found)
        raise NotFused(count=count, total=len(sites), sites="\n".join(f"  {x}" for x in found))


def check_across_ranks(sites: Sequence[Site]) -> None:
    """Raises NotAcrossRanks for attention that would be that of one rank's shard."""
    left = [site for site in sites if not site.recovered]
    if found := unfused(left):
        raise NotAcrossRanks(count=len(left), total=len(sites), sites="\n".join(f"  {x}" for x in found))


def _blocked(site: Site) -> tuple[str, str] | None:
    """Why it is not fused, and what would change that; None where it is, as far as known."""
    if site.reason is not None:
        return f"{site.reason.name}: {site.reason}", site.reason.unblock
    for part, runs in site.runs.items():
        if runs.by == "reference":
            whose = "its gradients are" if part == "backward" else "it is"
            return f"{whose} computed by plain PyTorch: {brief(runs.why)}", ""
    return None
