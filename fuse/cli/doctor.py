"""doctor: what this machine can do for fuse, tried out, and how to get what is missing."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec

import torch
from rich.table import Table
from rich.text import Text

import fuse
from fuse import backend
from fuse.bench.step import relative_error
from fuse.cli.console import show, work
from fuse.errors import FuseError
from fuse.failure import told
from fuse.options import VARIABLES, resolve
from fuse.report.required import unfused
from fuse.report.subject import machine
from fuse.settings import settings
from fuse.targets import registry, upkeep
from fuse.targets.private import make_private
from fuse.targets.protocols import Examined, Finding

Part = Callable[[], Iterator[Finding]]
_PRECISE = 1e-5  # relative error of attention in float32


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where something is missing."""
    with work() as say:
        say("looking at this machine, and building a kernel")
        findings = [finding for part in _PARTS for finding in _safely(part)]
    missing = [finding for finding in findings if finding.remedy]
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark = Text("✗", "bold red") if finding.remedy else Text("✓", "bold green")
        table.add_row(mark, finding.what, Text(finding.says, overflow="fold"))
        if finding.remedy:
            table.add_row("", "", Text(finding.remedy, style="yellow", overflow="fold"))
    show(table)
    print("All is well." if not missing else f"{len(missing)} to mend.")
    return int(bool(missing))


def _safely(part: Part) -> Iterator[Finding]:
    """With the mistake of the user's that keeps it from saying more."""
    try:
        yield from part()
    except FuseError as error:
        yield Finding("mistake", type(error).__name__, str(error))


def _software() -> Iterator[Finding]:
    yield Finding("fuse", f"{fuse.__version__}, Python {platform.python_version()}, {platform.system()}")
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    known = "fuse" in torch.compiler.list_backends()
    remedy = "" if known else "Install it, as pip install does: a source tree alone has no entry points"
    yield Finding("backend", 'torch.compile(model, backend="fuse") ' + ("finds it" if known else "does not find it"), remedy)
    yield Finding(
        "transformers", metadata.version("transformers") if find_spec("transformers") else "not installed, nor needed"
    )
    yield Finding("machine", machine())


def _environment() -> Iterator[Finding]:
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield Finding("environment", ", ".join(given) or "no variable of fuse is set")
    resolve(None, None)


def _targets() -> Iterator[Finding]:
    for name in registry.names():
        if isinstance(target := registry.named(name), Examined):
            yield from target.examine()


def _cache() -> Iterator[Finding]:
    folder = settings().cache_dir
    try:
        make_private(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Finding("cache", f"{folder} cannot be written to: {error.strerror}", "Set FUSE_CACHE_DIR to a folder of yours")
        return
    items = list(upkeep.items())
    states = Counter(upkeep.examine(item).state for item in items)
    size, free = sum(map(upkeep.size, items)) / 2**20, shutil.disk_usage(folder).free / 2**30
    holds = ", ".join(f"{n} {state}" for state, n in states.items()) or "empty"
    remedy = "python -m fuse cache --prune" if states["broken"] else ""
    yield Finding("cache", f"{folder}: {holds}, {size:.1f} MB; {free:.1f} GB of the disk are free", remedy)
    for access in upkeep.accesses():
        yield Finding("cache", f"{access.path}: {access.who} can write to it", access.refused)


def _tried() -> Iterator[Finding]:
    """Attention, compiled and run on each kind of device that has kernels."""
    for device in ("cpu", "cuda"):
        if (device == "cpu" or torch.cuda.is_available()) and registry.for_device(registry.AUTO, torch.device(device)):
            yield _run_on(device)


def _run_on(device: str) -> Finding:
    q = torch.randn(1, 2, 96, 32, device=device)
    compiled = torch.compile(_attention, backend="fuse", options={"inner": "eager", "qualify": "never"})
    before, start = len(backend.compiled), time.perf_counter()
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # the finding says it
            got = compiled(q)
    except Exception as error:
        return Finding(f"kernel on {device}", "it failed", told(error))
    seconds = time.perf_counter() - start
    exact = _attention(q.double())
    wrong = relative_error([got], [exact.cpu()]) or 0.0
    sites = [backend.with_runs(site) for reading in backend.compiled[before:] for site in reading.sites]
    if problems := unfused(sites):
        return Finding(f"kernel on {device}", "none could be had", f"{problems[0].why} {problems[0].unblock}".strip())
    if wrong > _PRECISE:
        return Finding(f"kernel on {device}", f"its relative error is {wrong:.1g}", "Please report this, with all of this page")
    return Finding(f"kernel on {device}", f"built or loaded, and right: {seconds:.1f} s, relative error {wrong:.0e}")


def _attention(q: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    scores = (q @ q.mT / math.sqrt(q.shape[3])).masked_fill(i > i[:, None], -math.inf)
    return scores.softmax(-1) @ q


_PARTS: tuple[Part, ...] = (_software, _environment, _targets, _cache, _tried)
