"""tune: measures which tile sizes a model's attention is fastest with on this GPU, on the model's own inputs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from fuse.cli import asked
from fuse.cli.console import work
from fuse.errors import NoDevice
from fuse.settings import settings
from fuse.targets import registry
from fuse.torch_private import pytree


def run(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            raise NoDevice(what="tuning")
        args.device = "cuda" if args.device == "cpu" else args.device
    before = set(_results())
    with work() as say:
        say(f"loading {args.model}")
        call = asked.loaded(args, weights=True)
        target = args.target or registry.tunable()[0]
        compiled = torch.compile(call.model, backend="fuse", options={"target": target, "tune": True})
        say(f"running {args.model}")
        with torch.set_grad_enabled(args.train):
            results = pytree.tree_leaves(compiled(*call.args, **call.kwargs))
        if args.train:
            wanted = [x for x in results if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
    for path in sorted(set(_results()) - before):
        found = json.loads(path.read_text())
        times = [x["seconds"] * 1e6 for x in found["measured"]]
        print(f"{found['kernel']}: {min(times):.1f} us by the fastest of {len(times)} plans, {max(times):.1f} by the slowest")
        print(f"    {path}")
    return 0


def _results() -> Iterator[Path]:
    for target in registry.names():
        yield from (settings().cache_dir / target).glob("tuned-*.json")
