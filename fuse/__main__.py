"""python -m fuse: what fuse would do with a model, its tuning, the kernels it has built, and where they are kept."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fuse import models
from fuse.errors import FuseError, NoDevice
from fuse.report.report import explain
from fuse.settings import settings
from fuse.targets import registry, upkeep
from fuse.targets.catalogue import catalogue
from fuse.torch_private import pytree


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except FuseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuse", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="explain | tune | kernels | cache")

    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("model", help="module:callable or file.py:callable, which returns (model, args), or a transformers type")
    named.add_argument("--layers", type=int, help="of a transformers type; its configuration's own number if not given")
    named.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="of a transformers type")
    named.add_argument("--train", action="store_true", help="as in training: with gradients and dropout")

    about = "find the attention of a model, and say what is fused and why the rest is not"
    sub = commands.add_parser("explain", parents=[named], help=about)
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    sub.add_argument("--passes", type=int, nargs="?", const=1, metavar="N", help="print what each pass made of site N (1)")
    sub.set_defaults(run=_explain)

    about = "run a model once on the GPU, measure which tile sizes its attention is fastest with, and keep that"
    sub = commands.add_parser("tune", parents=[named], help=about)
    sub.set_defaults(run=_tune)

    sub = commands.add_parser("kernels", help="list the generated sources in the cache")
    sub.set_defaults(run=_kernels)

    sub = commands.add_parser("cache", help="say where kernels are kept and how much they take")
    doing = sub.add_mutually_exclusive_group()
    doing.add_argument("--clear", action="store_true", help="delete them; they are built again when they are needed")
    about = "read all of it, and say what is broken, left over, or open to others; exit status 1 where something is broken"
    doing.add_argument("--check", action="store_true", help=about)
    about = "delete what is broken, left over, or was not used for DAYS, if given; what is being built stays"
    doing.add_argument("--prune", type=_days, nargs="?", const=math.inf, metavar="DAYS", help=about)
    sub.set_defaults(run=_cache)
    return parser


def _explain(args: argparse.Namespace) -> int:
    model, inputs, named = models.load(args.model, layers=args.layers, attention=args.attention)
    if isinstance(model, torch.nn.Module):
        model.train(args.train)
    with torch.set_grad_enabled(args.train):
        report = explain(model, *inputs, **named)
    if args.html:
        print(report.to_html(args.html))
    elif args.passes is not None:
        print(report.passes(args.passes) or f"no site {args.passes}: {report.summary}")
    else:
        print(report.to_json() if args.json else report)
    return 0


def _tune(args: argparse.Namespace) -> int:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        raise NoDevice(what="tuning")
    loaded = models.load(args.model, layers=args.layers, attention=args.attention)
    if isinstance(loaded.model, torch.nn.Module):
        loaded.model.train(args.train)
        if ":" not in args.model:
            models.fill(loaded.model)
    model, inputs, named = models.on("cpu" if interpreted else "cuda", loaded)
    before = set(_tuned())
    target = next(name for name in registry.names() if registry.named(name).tunable)
    compiled = torch.compile(model, backend="fuse", options={"target": target, "tune": True})
    with torch.set_grad_enabled(args.train):
        results = pytree.tree_leaves(compiled(*inputs, **named))
    if args.train:
        wanted = [x for x in results if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
    for path in sorted(set(_tuned()) - before):
        found = json.loads(path.read_text())
        times = [x["seconds"] * 1e6 for x in found["measured"]]
        print(f"{found['kernel']}: {min(times):.1f} us by the fastest of {len(times)} plans, {max(times):.1f} by the slowest")
        print(f"    {path}")
    return 0


def _tuned() -> Iterator[Path]:
    return (path for path in _cached({".json"}) if path.name.startswith("tuned-"))


def _kernels(args: argparse.Namespace) -> int:
    """Newest first, each with the comment it begins with."""
    for listed in catalogue():
        print(listed.source, *([f"FAILED: {listed.failed}"] if listed.failed else []))
        for line in listed.about:
            print("   ", line[:120])
    return 0


def _cache(args: argparse.Namespace) -> int:
    folder = settings().cache_dir
    files = list(_cached())
    size = sum(path.stat().st_size for path in files) / 2**20
    kernels = sum(path.suffix in _suffixes() for path in files)
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


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days: give 30, say, or 0 for all")
    return days


def _suffixes() -> set[str]:
    """Of sources."""
    return {target.suffix for name in registry.names() if (target := registry.named(name)).generated}


def _cached(suffixes: set[str] | None = None) -> Iterator[Path]:
    for target in registry.names():
        for path in (settings().cache_dir / target).rglob("*"):
            if path.is_file() and (suffixes is None or path.suffix in suffixes):
                yield path


if __name__ == "__main__":
    sys.exit(main())
