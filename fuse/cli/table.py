"""A report for a terminal: the text of ``str(report)`` in colour, as wide as there is room."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fuse.report.report import Report, SiteGroup

_STYLES = {"why not": "red", "to fuse it": "yellow", "score": "", "mask": "bold"}


def table(report: Report) -> RenderableType:
    whole = report.sites and report.fused == len(report.sites)
    parts: list[RenderableType] = [Text(report.summary, style="bold green" if whole else "bold yellow")]
    for group in report.groups():
        parts += [_title(group), _details(group)]
    return Group(*parts, *(Text(remark, style="dim") for remark in report.remarks))


def _title(group: SiteGroup) -> Text:
    site = group.site
    mark = Text("✓ ", "bold green") if site.fused else Text("✗ ", "bold red")
    sites = f"{group.count} site{'s' * (group.count != 1)}"
    return Text.assemble("\n", mark, (sites, "bold"), "  ", (site.where, "cyan"), "  ", group.modules)


def _details(group: SiteGroup) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in (("mask", group.site.mask), *group.details):
        if text:
            grid.add_row(name, Text(text, style=_STYLES.get(name, "")))
    return Padding(grid, (0, 0, 0, 2))
