"""Lines of the user's source around those that a site comes from."""

from __future__ import annotations

import linecache
import textwrap
from dataclasses import dataclass
from pathlib import Path

from fuse.report.site import Frame

_AROUND = 5
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Excerpt:
    """
    path   as short as it can be understood
    line   the one that is meant
    lines  with their numbers, without the margin that all have; () where the file cannot be read
    """

    path: str
    line: int
    function: str
    lines: tuple[tuple[int, str], ...]


def excerpt(frame: Frame, around: int = _AROUND) -> Excerpt:
    """``around``: lines before and after that of the frame."""
    linecache.checkcache(frame.file)
    source = linecache.getlines(frame.file)
    if not 0 < frame.line <= len(source):
        return Excerpt(short_path(frame.file), frame.line, frame.function, ())
    first = max(frame.line - around, 1)
    shown = textwrap.dedent("".join(source[first - 1 : frame.line + around])).rstrip().split("\n")
    return Excerpt(short_path(frame.file), frame.line, frame.function, tuple(enumerate(shown, first)))


def short_path(file: str) -> str:
    """Without what differs between machines: from the package, or from the current folder, or the bare name."""
    path = Path(file)
    for i, part in reversed(list(enumerate(path.parts))):
        if part in _INSTALLED:
            return "/".join(path.parts[i + 1 :])
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name
