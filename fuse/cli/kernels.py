"""kernels: what was built, the newest first, each with the comment that it begins with."""

from __future__ import annotations

import argparse

from fuse.targets.catalogue import catalogue

_WIDTH = 120  # of a line; a spec goes on for longer


def run(args: argparse.Namespace) -> int:
    for listed in catalogue():
        print(listed.source, *([f"FAILED: {listed.failed}"] if listed.failed else []))
        for line in listed.about:
            print("   ", line[:_WIDTH])
    return 0
