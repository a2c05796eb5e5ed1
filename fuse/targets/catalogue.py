"""The kernels in the cache, for people: where each is, what it says of itself, and whether it can be used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuse.settings import settings
from fuse.targets import registry, upkeep
from fuse.targets.stored import Stored, never_built, stored

_SAID = re.compile(r"(?://|#)(?: (.*))?")  # "#define" is code
_FAILED = "it could not be built; the next run tries again"


@dataclass(frozen=True)
class Listed:
    """
    about   the lines of the comment at its top
    failed  why it cannot be used; "" where it can
    """

    source: Path
    about: tuple[str, ...]
    failed: str = ""


def catalogue() -> list[Listed]:
    """All kernels that have a source, the newest first."""
    found = [(source, item) for item in _items() if (source := _source(item)) is not None]
    found.sort(key=lambda each: each[0].stat().st_mtime, reverse=True)
    return [Listed(source, tuple(_about(source)), _failed(item)) for source, item in found]


def _items() -> Iterator[Stored]:
    for name in registry.names():
        if registry.named(name).generated:
            yield from (i for i in stored(settings().cache_dir / name) if i.kind != "partial")


def _source(item: Stored) -> Path | None:
    suffixes = {target.suffix for target in map(registry.named, registry.names()) if target.generated}
    return next((path for path in item.paths if path.suffix in suffixes), None)


def _about(source: Path) -> Iterator[str]:
    for line in source.read_text(errors="replace").splitlines():
        if (said := _SAID.fullmatch(line)) is None:
            return
        yield said[1] or ""


def _failed(item: Stored) -> str:
    finding = upkeep.examine(item)
    if finding.state == "left over" and never_built(item.contents()):
        return _FAILED
    return "" if finding.state in ("whole", "foreign") else finding.why
