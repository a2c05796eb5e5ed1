"""cache: where kernels are kept, what of it is broken or open to others, and the removal of what is not needed."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter

from fuse.settings import settings
from fuse.targets import registry, upkeep


def run(args: argparse.Namespace) -> int:
    items = list(upkeep.items())
    kernels = sum(item.kind in ("kernel", "source") for item in items)
    size = sum(map(upkeep.size, items)) / 2**20
    folder = settings().cache_dir
    print(f"{folder}: {kernels} kernel{'s' * (kernels != 1)}, {size:.1f} MB{', deleted' if args.clear else ''}")
    if args.clear:
        for target in registry.names():  # never the folder itself, which may hold files of others
            shutil.rmtree(folder / target, ignore_errors=True)
    if args.prune is not None:
        return _prune(args.prune)
    return _check() if args.check else 0


def _check() -> int:
    found = [(item, upkeep.examine(item)) for item in upkeep.items()]
    for item, finding in found:
        if finding.state != "whole":
            print(f"    {finding.state:<11}{item.folder.name}/{item.name}: {finding.why}")
    accesses = list(upkeep.accesses())
    for access in accesses:
        print(f"    open       {access.path}: {access.refused or f'{access.who} can write to it'}")
    count = Counter(finding.state for _, finding in found)
    print("   ", ", ".join(f"{count[state]} {state}" for state in ("whole", "broken", "left over", "in use")))
    if count["broken"] or count["left over"]:
        print("python -m fuse cache --prune deletes what is broken or left over; kernels are built again when they are needed")
    return int(bool(count["broken"]) or any(access.refused for access in accesses))


def _prune(days: float) -> int:
    freed, failed = 0, False
    for removal in upkeep.prune(days):
        freed, failed = freed + removal.size, failed or bool(removal.failed)
        about = f"not deleted: {removal.failed}" if removal.failed else removal.why
        print(f"    {removal.item.folder.name}/{removal.item.name}: {about}")
    print(f"    {freed / 2**20:.1f} MB freed")
    return int(failed)
