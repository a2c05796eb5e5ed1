"""explain() and report(): what fuse found in a model, what it made of it, and why it left the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fuse import backend
from fuse.errors import CallFailed, NotCallable
from fuse.failure import told
from fuse.ir.expr import Load, index, walk
from fuse.ir.spec import AttentionSpec
from fuse.options import Options, resolve
from fuse.passes.census import LOOKED_FOR
from fuse.report.paths import merge_paths
from fuse.report.runs import Part, Runs, brief
from fuse.report.site import Other, Reading, Site
from fuse.report.sparsity import Coverage, coverage
from fuse.report.subject import Subject
from fuse.targets import registry
from fuse.targets.standin import ASKED
from fuse.torch_private import dynamo_config, hint, original

# An analysis shares Dynamo's code cache with the user's compiled functions but none of its entries.
_ANALYSIS = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20, "automatic_dynamic_shapes": False}


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="fuse")`` would do with ``model(*args, **kwargs)``.

    Nothing is built and no graph is run: where a graph ends before the model does, zeros stand in for its results. Python
    code that branches on such values may take another way than it would.

    Raises NotCallable for what is no model, CallFailed where arguments were given as one tuple, and what the call raises.
    """
    if not callable(model):
        hint = f" python -m fuse explain {model} takes names." if isinstance(model, str) else ""
        raise NotCallable(got=f"{model!r}"[:80], hint=hint)
    return explained(resolve(None, None), model, args, kwargs)


def explained(chosen: Options, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Report:
    """As ``explain``, with options. Raises what the call raises, where no graph was read before."""
    readings: list[Reading] = []

    def analyse(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        results = _results(gm)  # the passes may replace the nodes that know them
        is_read = backend.is_read(example_inputs, chosen)
        readings.append(backend.rewrite(gm, chosen, example_inputs) if is_read else backend.unread(example_inputs, chosen))
        return lambda *_: tuple(map(_stand_in, results))

    note = ""
    try:
        with dynamo_config.patch(_ANALYSIS):
            torch.compile(original(model), backend=analyse)(*args, **kwargs)
    except Exception as error:
        if not readings and len(args) == 1 and isinstance(args[0], tuple):
            hint = " All arguments were given as one tuple: if they are several, write fuse.explain(model, *args)."
            raise CallFailed(error=told(error), hint=hint) from error
        if not readings:
            raise
        note = f"The analysis ended after {_counted(len(readings), 'graph')}, zeros do not lead further: {told(error)}"
    return replace(expected(readings, note), subject=Subject.of(model, args, kwargs))


def expected(readings: Sequence[Reading], note: str = "") -> Report:
    """Before anything has been built."""
    found = Report.of(readings, note)
    return replace(found, sites=tuple(map(_expected, found.sites)))


def report() -> Report:
    """The sites of every graph compiled in this process since the last ``reset()``, with what is known now of their kernels."""
    found = Report.of(backend.compiled)
    return replace(found, sites=tuple(map(backend.with_runs, found.sites)))


def reset() -> None:
    """Empties what ``report()`` gives. Compiled functions and caches stay."""
    backend.compiled.clear()


@dataclass(frozen=True)
class Report:
    """What was found, in the order of the graphs.

    sites   attention, fused or not
    note    why an analysis is not complete, "" where it is
    others  normalisations that are no attention, such as a router's softmax
    graphs  how many were looked into
    unread  why others were not, one for each
    subject the model and its call, as far as known
    """

    sites: tuple[Site, ...]
    note: str = ""
    others: tuple[Other, ...] = ()
    graphs: int = 0
    unread: tuple[str, ...] = ()
    subject: Subject = Subject()

    @staticmethod
    def of(readings: Sequence[Reading], note: str = "") -> Report:
        sites = tuple(site for reading in readings for site in reading.sites)
        others = tuple(other for reading in readings for other in reading.others)
        unread = tuple(reading.unread for reading in readings if reading.unread)
        return Report(sites, note, others, len(readings) - len(unread), unread)

    @property
    def fused(self) -> int:
        """Sites that a generated kernel computes."""
        return sum(site.fused for site in self.sites)

    @property
    def recovered(self) -> int:
        """Sites that fuse computes, by kernels or by the reference."""
        return sum(site.recovered for site in self.sites)

    def groups(self) -> list[SiteGroup]:
        """Sites of which the same is to be said, but for the module path: layers of a model, or one at several lengths."""
        same: dict[str, list[Site]] = {}
        for site in self.sites:
            said = replace(site, module="", spec=None, names={}, steps=(), frames=(), measured="", weights=())
            same.setdefault(repr(said), []).append(site)
        alike: dict[tuple[object, ...], list[Site]] = {}
        for sites in same.values():
            site = sites[0]
            shown = site.fused, site.where, site.mask, *SiteGroup(site, 1, "").details
            alike.setdefault(shown, []).extend(sites)
        return [SiteGroup(sites[0], len(sites), merge_paths([site.module for site in sites])) for sites in alike.values()]

    def __str__(self) -> str:
        return "\n".join([self.summary, *_table(self.groups()), *self.remarks])

    @property
    def remarks(self) -> list[str]:
        """What there is to say beside the sites, a line each."""
        found = []
        if not self.sites and self.graphs:
            found.append(f"looked for {LOOKED_FOR} in {_counted(self.graphs, 'graph')}")
        if self.others:
            found.append(f"{_counted(len(self.others), 'other normalisation')}, read as no attention: report.others")
        found += [f"{_counted(n, 'graph')} not looked into: {why}" for why, n in Counter(self.unread).items()]
        return [*found, self.note] if self.note else found

    def passes(self, number: int = 1) -> str:
        """What each pass made of one recovered site, counted from 1; "" where there is none of that number."""
        found = [site for site in self.sites if site.steps][number - 1 : number]
        lines: list[str] = []
        for site in found:
            lines.append(f"{site.where}  {site.module}".rstrip())
            before: AttentionSpec | None = None
            for name, spec in site.steps:
                shown = ["as before"] if spec == before else str(spec).splitlines()
                lines += ["", name, *(f"    {line}" for line in shown)]
                before = spec
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        found = [_counted(len(self.sites), "attention site"), f"{self.fused} fused"]
        slow = sum(site.by_reference for site in self.sites)
        behind = sum(site.fused and "backward" in site.runs and site.runs["backward"].by == "reference" for site in self.sites)
        found += [f"{slow} by the reference"] * bool(slow) + [f"gradients of {behind} by the reference"] * bool(behind)
        return ", ".join(found)

    def to_json(self) -> str:
        """All of it, for programs, with the kernels' sources."""
        from fuse.report import data  # which reads reports

        return json.dumps(data.of(self), indent=2)

    def _repr_html_(self) -> str:
        """In a notebook: a short table, and the page without kernels."""
        from fuse.report import page

        return page.in_notebook(page.page_of(self, kernels=False))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In IPython."""
        printer.text(str(self))

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page and returns its path."""
        from fuse.report import page  # which shows reports

        path = Path(path)
        path.write_text(page.rendered(page.page_of(self)), encoding="utf-8")
        return path


@dataclass(frozen=True)
class SiteGroup:
    """``count`` sites at one line of source in modules of one name pattern."""

    site: Site
    count: int
    modules: str

    @property
    def details(self) -> list[tuple[str, str]]:
        """What there is to say below the line of the table: (name, text)."""
        site, reason = self.site, self.site.reason
        found = [
            ("score", "" if site.formula == "score" else site.formula),  # nothing but the product
            ("softmax", "" if site.spec is None or site.spec.softmax else _IN_ITS_PLACE[site.spec.normalisation]),
            ("skipped", skipped_text(site)),
            ("hint", hint_text(site)),
            ("relies on", relies_text(site)),
            ("beside", " and ".join(site.beside)),
            *((part, brief(str(runs))) for part, runs in site.runs.items()),
        ]
        if reason is not None:
            found += [("why not", f"{reason.name}: {reason}"), ("to fuse it", reason.unblock)]
        return [(name, text) for name, text in found if text]


_IN_ITS_PLACE = {"none": "none: scores multiply the values", "sum": "none: scores are divided by their sum"}


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def skipped(site: Site) -> Coverage | None:
    """The share of tiles that the site's kernel on this machine skips, for the sizes that were compiled; None without mask,
    and where the reference runs, which skips none.
    """
    if site.spec is None or site.spec.mask is None or site.by_reference:
        return None
    size = registry.named(site.target).tile_size(site.spec)
    return None if size is None else coverage(site.spec, site.sizes, *size)


def skipped_text(site: Site) -> str:
    found = skipped(site)
    if site.spec is None or found is None:
        return ""
    sizes = dict(zip(site.spec.symbols, site.sizes, strict=True))
    return f"{found} ({sizes['q_len']} queries, {sizes['kv_len']} keys)"


def relies_text(site: Site) -> str:
    return f"what {' and '.join(site.relies)} holds: compiled anew when that changes" if site.relies else ""


def hint_text(site: Site) -> str:
    """What would make a formula of a mask that is stored entry by entry; "" where none is."""
    if site.spec is None or site.spec.mask is None:
        return ""
    loads = [n for n in walk(site.spec.mask.predicate) if isinstance(n, Load)]
    stored = {site.names.get(n.operand, "the mask"): None for n in loads if {index("q"), index("k")} <= set(n.coords)}
    read = "positions that forward compares (torch.arange), or a buffer that holds what such a formula gives"
    return f"{' and '.join(stored)} has a value for each query and key; read as a formula would be {read}" if stored else ""


def _table(groups: Sequence[SiteGroup]) -> list[str]:
    rows = [("sites", "fused", "where", "mask", "module")]
    rows += [(str(g.count), "yes" if g.site.fused else "no", g.site.where, g.site.mask or "-", g.modules) for g in groups]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row, group in zip(rows, [None, *groups], strict=True):
        cells = (f"{cell:>{w}}" if i == 0 else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=False)))
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
        lines += [f"{'':9}{name:<11} {text}" for name, text in (group.details if group else [])]
    return lines if groups else []


def _expected(site: Site) -> Site:
    """As it will run, as far as that was asked for."""
    if not site.recovered or registry.named(site.target).generated:
        return site
    parts: list[Part] = ["forward", *["backward"] * any(site.wanted), *["weights"] * bool(site.weights)]  # type: ignore[list-item]
    return replace(site, runs=dict.fromkeys(parts, Runs("reference", why=ASKED)))


def _results(gm: GraphModule) -> list[Any]:
    (outputs,) = gm.graph.find_nodes(op="output")[0].args
    return [x.meta.get("example_value") if isinstance(x, Node) else x for x in outputs]


def _stand_in(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape, strides = ([_hint(s) for s in sizes] for sizes in (value.shape, value.stride()))
        zeros = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device).zero_()
        return zeros.requires_grad_(value.requires_grad)
    return _hint(value) if isinstance(value, torch.SymInt) else value


def _hint(size: int | torch.SymInt) -> int:
    """The size this call has; 1 where it would only be known after running the graph."""
    return size if isinstance(size, int) else hint(size) or 1
