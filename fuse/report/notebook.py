"""Reports and sites in a notebook: small tables in the notebook's own colours, and the whole page folded away."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fuse.report.excerpt import excerpt
from fuse.report.formula import lines

if TYPE_CHECKING:
    from fuse.report.site import Site  # which shows itself by this module

_LINE = "border-bottom:1px solid color-mix(in srgb, currentColor 20%, transparent);background:none"
_CELL = "text-align:left;vertical-align:top;padding:.2em 1em .2em 0;background:none"
_CODE = f"{_CELL};font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:break-word"


def facts(site: Site) -> Iterator[tuple[str, str, str]]:
    """What there is to say of a site, a line each: name, text, and that as HTML where it is more than the text."""
    yield "site", f"{site.where}  {site.module}".rstrip(), ""
    yield "fused", "yes" if site.fused else "no, the reference computes it" if site.recovered else "no", ""
    if site.reason is not None:
        yield "why not", f"{site.reason.name}: {site.reason}", ""
        yield "to fuse it", site.reason.unblock, ""
    if site.spec is not None:
        yield "mask", site.mask or "none", ""
        sizes = zip(site.spec.symbols, site.sizes, strict=True)
        yield "sizes", ", ".join(f"{name} = {size or '?'}" for name, size in sizes), ""
        formula = lines(site.spec, site.names)
        typeset = "".join(f'<div style="margin:.3em 0">{line.mathml}</div>' for line in formula)
        yield "computes", "\n".join(line.text for line in formula), typeset
    yield from ((part, str(runs), "") for part, runs in site.runs.items())
    if site.measured:
        yield "measured", site.measured, ""
    if site.frames and (source := dict((found := excerpt(site.frames[-1], around=0)).lines)):
        yield "source", source[found.line].strip(), ""


def site_text(site: Site) -> str:
    """``facts`` for a terminal."""
    told = ((name, text.replace("\n", f"\n{'':12}")) for name, text, _ in facts(site))
    return "\n".join(f"{name:<11} {text}" for name, text in told)


def site_html(site: Site) -> str:
    """``facts`` as a table, with the formula typeset."""
    return _table([_cell(name, "th"), _cell(text, "td", _CODE, marked)] for name, text, marked in facts(site))


def report_html(summary: str, head: Sequence[str], rows: Iterable[Sequence[str]], page: str) -> str:
    """A table of ``rows`` of text below ``head``, and ``page``, a whole document, on demand."""
    table = _table([[_cell(name, "th") for name in head], *([_cell(text, "td", _CODE) for text in row] for row in rows)])
    frame = f'<iframe srcdoc="{html.escape(page)}" loading="lazy" style="width:100%;height:42em;border:0"></iframe>'
    folded = f'<details><summary style="cursor:pointer">the whole page</summary>{frame}</details>'
    return f"<div><p><b>{html.escape(summary)}</b></p>{table}{folded}</div>"


def _table(rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f'<tr style="{_LINE}">{"".join(row)}</tr>' for row in rows)
    return f'<table style="border-collapse:collapse;margin:.3em 0">{body}</table>'


def _cell(text: str, kind: str, style: str = _CELL, marked: str = "") -> str:
    """``marked``: the text as HTML, where that is more than itself."""
    return f'<{kind} style="{style}">{marked or html.escape(text)}</{kind}>'
