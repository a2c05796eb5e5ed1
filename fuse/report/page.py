"""A report as one page: what the template shows, as plain data, and the page itself."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

import fuse.templates
from fuse.ir.spec import AttentionSpec
from fuse.kernel.source import environment
from fuse.report.excerpt import Excerpt, excerpt
from fuse.report.formula import Line, Tensor, lines, tensors
from fuse.report.listing import Listing, listings, said
from fuse.report.notebook import report_html
from fuse.report.paths import merge_paths
from fuse.report.picture import EXAMPLES, Picture, draw
from fuse.report.report import Report, hint_text, relies_text, skipped_text
from fuse.report.sentence import sentences
from fuse.report.site import Other, Site
from fuse.report.subject import surroundings
from fuse.targets import registry

_TILE = (64, 64)  # where a kernel skips none, or is not known
_STATUS = {"fused": "fused", "reference": "by the reference", "left": "not fused"}
_MEANS = {
    "fused": "a generated kernel computes it",
    "reference": "its function was read, but plain PyTorch computes it, slowly: there is no kernel",
    "left": "it runs as if fuse were not there",
}
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Place:
    """``count`` sites of a group at one line, in calls of one size."""

    count: int
    where: str
    modules: str
    sizes: str


@dataclass(frozen=True)
class Step:
    """What a pass made of a spec: lines, each with whether it is new (+), gone (-) or as before ( )."""

    name: str
    lines: tuple[tuple[str, str], ...]

    @property
    def changed(self) -> bool:
        return any(mark != " " for mark, _ in self.lines)


@dataclass(frozen=True)
class Group:
    """Sites that compute the same, whatever their tensors are called and wherever they stand.

    status    "fused", "reference" or "left"
    facts     (name, text) of what there is to say
    reason    why they were left: (name, text, what would change that), or None
    mask      its conditions, each with what it means
    picture   see fuse.report.picture; or why there is none
    excerpts  the line that they come from, and those that called it, innermost first
    """

    number: int
    count: int
    status: str
    title: str
    places: tuple[Place, ...]
    facts: tuple[tuple[str, str], ...]
    reason: tuple[str, str, str] | None
    formula: tuple[Line, ...]
    tensors: tuple[Tensor, ...]
    mask: tuple[tuple[str, str], ...]
    picture: Picture | str
    examples: tuple[tuple[str, str], ...]
    excerpts: tuple[Excerpt, ...]
    steps: tuple[Step, ...]
    listings: tuple[Listing, ...]

    @property
    def id(self) -> str:
        return f"g{self.number}"

    @property
    def says(self) -> str:
        """Its status in words."""
        return _STATUS[self.status]

    def code(self, part: str) -> dict[str, list[tuple[str, str]]]:
        """Where its kernels compute a part of the formula: by what each computes, (id of the line, name)."""
        found: dict[str, list[tuple[str, str]]] = {}
        for number, listing in enumerate(self.listings, 1):
            for entry in listing.outline:
                if entry.part == part:
                    found.setdefault(listing.what, []).append((f"{self.id}k{number}-{entry.line}", entry.name))
        return found


@dataclass(frozen=True)
class Page:
    title: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]
    groups: tuple[Group, ...]
    others: tuple[Other, ...]

    @property
    def statuses(self) -> dict[str, int]:
        """How many sites of each status there are."""
        found = Counter(dict.fromkeys(_STATUS, 0))
        for group in self.groups:
            found[group.status] += group.count
        return {name: n for name, n in found.items() if n}

    @property
    def pictures(self) -> dict[str, Any]:
        """By a group's id, what the page computes pictures of."""
        return {g.id: asdict(g.picture) for g in self.groups if isinstance(g.picture, Picture)}


def page_of(report: Report, kernels: bool = True) -> Page:
    """``kernels``: with their sources."""
    groups = tuple(_group(number, sites, kernels) for number, sites in enumerate(_alike(report.sites), 1))
    subject = [("model", report.subject.model), ("called with", "; ".join(report.subject.inputs))]
    facts = (*((name, text) for name, text in subject if text), *surroundings())
    title = report.subject.model.partition(",")[0] or "compiled in this process"
    return Page(title, report.summary, facts, tuple(report.remarks), groups, report.others)


def rendered(page: Page) -> str:
    """One self-contained page of HTML."""
    template = environment().overlay(autoescape=True).get_template("report/page.html.jinja")
    assets = {"style": _asset("style.css"), "script": _asset("mask.js") + _asset("page.js")}
    return template.render(page=page, status=_STATUS, means=_MEANS, **assets)


def in_notebook(page: Page) -> str:
    """A short table, and the page in it."""
    rows = [
        (str(g.count), g.says, g.title, " and ".join(text for text, _ in g.mask) or ("" if g.reason else "none"), _short(g))
        for g in page.groups
    ]
    head = ("sites", "", "where", "mask", "")
    return report_html("; ".join([page.summary, *page.remarks]), head, rows, rendered(page))


def _short(group: Group) -> str:
    """What most wants to be known of it: why it was left, or what is saved."""
    if group.reason is not None:
        return f"{group.reason[0]}: {group.reason[1]}"
    skipped = dict(group.facts).get("work skipped", "")
    return f"skips {skipped}" if skipped else ""


@cache
def _asset(name: str) -> Markup:
    return Markup((Path(fuse.templates.__path__[0]) / "report" / name).read_text())


# --------------------------------------------------------------------------------------------------------------- groups


def _alike(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that compute the same, in the order in which they were met."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        by = tuple((part, runs.by, runs.why) for part, runs in site.runs.items())
        key = (site.spec, site.target, site.wanted, by) if site.recovered else (site.reason, site.where)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _group(number: int, sites: Sequence[Site], kernels: bool) -> Group:
    site = sites[0]
    spec, drawn = site.spec, _picture(site)
    shown = [excerpt(frame) for frame in reversed(site.frames)]
    modules, places = merge_paths([s.module for s in sites if s.module]), tuple(_places(sites))
    return Group(
        number, len(sites), "left" if not site.recovered else "reference" if site.by_reference else "fused",
        modules or site.where or "at a place that is not known", places, tuple(_facts(site, len(places) > 1)), _reason(site),
        lines(spec, site.names) if spec else (), tensors(spec, site.names) if spec else (),
        tuple(sentences(spec.mask.predicate, site.names)) if spec and spec.mask else (), drawn,
        () if isinstance(drawn, str) else tuple((e.name, EXAMPLES[e.role]) for e in drawn.examples),
        tuple(shown), tuple(_steps(site)), listings(site) if kernels else (),
    )  # fmt: skip


def _picture(site: Site) -> Picture | str:
    if site.spec is None:
        return ""
    tile = registry.named(site.target).tile_size(site.spec) or _TILE
    return draw(site.spec, site.sizes, site.names, tile)


def _reason(site: Site) -> tuple[str, str, str] | None:
    return None if site.reason is None else (site.reason.name, str(site.reason), site.reason.unblock)


def _places(sites: Sequence[Site]) -> Iterator[Place]:
    found: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        found.setdefault((site.where, _sizes(site)), []).append(site)
    for (where, sizes), here in found.items():
        yield Place(len(here), where, merge_paths([s.module for s in here if s.module]), sizes)


def _facts(site: Site, others: bool) -> Iterator[tuple[str, str]]:
    """Of one site; ``others``: there are some elsewhere, or of other sizes."""
    spec = site.spec
    if spec is None:
        return
    yield "sizes", f"{_sizes(site)}, {_features(spec)}{' (others below)' * others}"
    scores = "" if spec.score.dtype == spec.out_dtype else f", scores in {spec.score.dtype}"
    yield "dtype", spec.out_dtype + scores
    if spec.mask is not None:
        yield "work skipped", skipped_text(site) or "none"
    yield from ((name, text) for name, text in (("hint", hint_text(site)), ("relies on", relies_text(site))) if text)
    if site.beside:
        yield "given beside", " and ".join(site.beside)
    yield "memory saved", _memory(spec, site)
    names = {"forward": "result by", "backward": "gradients by", "tile map": "map of tiles by", "weights": "weights by"}
    yield from ((names[part], said(runs)) for part, runs in site.runs.items())
    if not site.runs:
        yield "result by", f"a kernel of target {site.target}, built when the model first runs"
    if any(site.wanted):
        wanted = [site.names.get(i, f"operand{i}") for i, w in enumerate(site.wanted) if w]
        yield "gradients of", ", ".join(wanted)
    if site.measured:
        yield "measured", site.measured


def _sizes(site: Site) -> str:
    if site.spec is None:
        return ""
    values = {name: size or "?" for name, size in zip(site.spec.symbols, site.sizes, strict=True)}
    batch = " × ".join(str(values[f"B{i}"]) for i in range(site.spec.batch))
    more = "".join(f", {name} = {values[name]}" for name in site.spec.extra)
    return f"batch {batch or 1}, {values['q_len']} queries, {values['kv_len']} keys{more}"


def _features(spec: AttentionSpec) -> str:
    return f"{spec.qk_dim} features" + (f", {spec.v_dim} of values" if spec.v_dim != spec.qk_dim else "")


def _memory(spec: AttentionSpec, site: Site) -> str:
    """Of a tensor of scores, which no kernel stores."""
    sizes = site.sizes[: spec.batch + 2]
    dtype: torch.dtype = getattr(torch, spec.score.dtype)
    if not all(sizes):
        return "scores are not stored; their size depends on the data"
    if site.by_reference:
        return "none: the reference stores the scores"
    amount = _amount(math.prod(sizes) * dtype.itemsize)
    return f"{amount} for each tensor of scores, which no kernel stores ({' × '.join(map(str, sizes))} {spec.score.dtype})"


def _amount(size: float) -> str:
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            return f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError


def _steps(site: Site) -> Iterator[Step]:
    before: list[str] = []
    for name, spec in site.steps:
        now = _lines(spec)
        yield Step(name, tuple(_compared(before, now) if before else ((" ", line) for line in now)))
        before = now


@cache
def _lines(spec: AttentionSpec) -> list[str]:
    return str(spec).splitlines()


def _compared(before: Sequence[str], now: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in difflib.ndiff(before, now):
        if line[0] != "?":
            yield line[0], line[2:]
