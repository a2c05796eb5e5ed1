"""A kernel's source as the page shows it, with the outline that it begins with as places to go to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fuse.report.runs import Part, Runs, brief
from fuse.report.site import Site
from fuse.targets import sources

_ENTRY = re.compile(r"(?://|#)   ?(\S.*?)  +(\S.*)")
_BEGINS = re.compile(r"(?://|#) contents, in order")
# Which line of the formula a part of a kernel computes, by what the outline says of it.
_COMPUTES = (
    ("mask", r"mask|may see"),
    ("result", r"weight"),
    ("score", r"score|eager rounds"),
    ("softmax", r"a block of queries"),
)
_WHAT: dict[Part, str] = {
    "forward": "result",
    "backward": "gradients",
    "tile map": "map of the mask's tiles",
    "weights": "weights",
}


@dataclass(frozen=True)
class Entry:
    """A line of the outline: where it is defined, and which line of the formula it computes, or ""."""

    name: str
    what: str
    line: int
    part: str


@dataclass(frozen=True)
class Listing:
    """``what`` the kernel computes; ``about``: what runs it, or would; ``language``: "cpp" or "python"."""

    what: str
    about: str
    language: str
    text: str
    outline: tuple[Entry, ...]


def listings(site: Site) -> tuple[Listing, ...]:
    """The kernels of a site: as they lie on disk where they were built, else as they would be built here."""
    if site.spec is None or not site.recovered:
        return ()
    ready = {part: text for part, runs in site.runs.items() if (text := _text(runs))}
    rendered = {} if ready.keys() >= site.runs.keys() > set() else sources(site.spec, site.target, site.wanted, site.weights)
    found = []
    for part, what in _WHAT.items():
        runs = site.runs.get(part)
        text = ready.get(part) or ("" if runs is not None and runs.by == "reference" else rendered.get(part, ""))
        if text:
            about = said(runs) if runs is not None and part in ready else "as it would be built on this machine"
            found.append(Listing(what, about, "cpp" if text.startswith("//") else "python", text, tuple(contents(text))))
    return tuple(found)


def said(runs: Runs) -> str:
    """What runs, in a line, with the bare name of its file: folders are those of one machine."""
    return brief(str(runs if runs.file is None else replace(runs, file=Path(runs.file.name))))


def _text(runs: Runs) -> str:
    """ "" where there is no file, or none that can be read."""
    try:
        return "" if runs.file is None else Path(runs.file).read_text(errors="replace")
    except OSError:
        return ""


def contents(text: str) -> Iterator[Entry]:
    """The outline in a source's header, as fuse.targets writes it; nothing where there is none."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if _BEGINS.fullmatch(line)), None)
    if begin is None:
        return
    for at, line in enumerate(lines[begin + 1 :], begin + 1):
        if (found := _ENTRY.fullmatch(line)) is None:
            return
        name, what = found.groups()
        place = _place(lines, at, name, what)
        if place is not None:
            part = next((part for part, words in _COMPUTES if re.search(words, what)), "")
            yield Entry(what if name == "# edit" else name, "" if name == "# edit" else what, place + 1, part)


def _place(lines: list[str], after: int, name: str, what: str) -> int | None:
    """Where it is defined, or marked: the first such line behind the outline."""
    marked = f"{name}: {what}"
    defined = re.compile(rf"(?:\b(?:struct|class|def|void|int|int64_t)\s[^;=]*)\b{re.escape(name)}\b\s*(?:[({{<:]|$)")
    fits = (i for i, line in enumerate(lines[after:], after) if not line.startswith(("// ", "#  ")))
    return next((i for i in fits if marked in lines[i] or defined.search(lines[i])), None)
