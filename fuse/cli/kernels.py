"""kernels: what was built, the newest first, each with the comment that it begins with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fuse.targets import registry, upkeep
from fuse.targets.stored import Stored

_WIDTH = 120  # of a line; a spec goes on for longer


def run(args: argparse.Namespace) -> int:
    for source, item in sorted(_sources(), key=lambda found: found[0].stat().st_mtime, reverse=True):
        finding = upkeep.examine(item)
        print(source if finding.state == "whole" else f"{source}  ({finding.state}: {finding.why})")
        for line in _comment(source):
            print("   ", line[:_WIDTH])
    return 0


def _sources() -> Iterator[tuple[Path, Stored]]:
    suffixes = {target.suffix for name in registry.names() if (target := registry.named(name)).generated}
    for item in upkeep.items():
        yield from ((path, item) for path in item.paths if path.suffix in suffixes)


def _comment(source: Path) -> Iterator[str]:
    for line in source.read_text(errors="replace").splitlines():
        if not (line.startswith("//") or line == "#" or line.startswith("# ")):
            return
        yield line.lstrip("/# ")
