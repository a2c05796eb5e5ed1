"""bench: eager PyTorch, Inductor and fuse on the user's model."""

from __future__ import annotations

import argparse

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fuse import models
from fuse.bench import WAYS, Case, Comparison, Failed, Measured, Ways
from fuse.cli import asked
from fuse.cli.console import show, work
from fuse.errors import CallFailed
from fuse.models import ModelCall, Wanted
from fuse.report.report import Report
from fuse.report.required import unfused
from fuse.report.subject import machine

_LEGEND = """\
Extra peak: memory beside what there is before the call.
Error: of all results, relative to float64's; none where random numbers are drawn.
First call: with what the caches hold; --cold gives each way empty ones."""


def run(args: argparse.Namespace) -> int:
    options = {} if args.target is None else {"target": args.target}
    asked.options(args)
    asked.check_device(args.device)
    case = Case(made, (args.model, asked.wanted(args), args.device, args.train), args.train, options)
    with Ways(args.cold) as ways, work(len(WAYS) + args.rounds) as say:
        found = ways.compare(case, args.rounds, say)
    if isinstance(eager := found.found["eager"], Failed):
        raise CallFailed(error=eager.why, hint="")
    _show(found, args)
    return int(any(isinstance(result, Failed) for result in found.found.values()))


def made(name: str, wanted: Wanted, device: str, train: bool) -> ModelCall:
    """In each process."""
    call = models.to(models.load(name, wanted), device)
    if isinstance(call.model, torch.nn.Module):
        call.model.train(train)
    return call


def _show(found: Comparison, args: argparse.Namespace) -> None:
    table = Table.grid(padding=(0, 3))
    for heading in ("", "call", "extra peak", "error", "first call"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(*(Text(heading, "bold") for heading in ("", "call", "extra peak", "error", "first call")))
    for way, result in found.found.items():
        if isinstance(result, Measured):
            table.add_row(way, _time(found.seconds[way]), _memory(result.peak), _error(result.error), _time(result.first))
    failed = [Text(f"{way} failed: {x.why}", "red") for way, x in found.found.items() if isinstance(x, Failed)]
    about = "a step of training" if args.train else "a call"
    measured = f"Medians of {args.rounds} rounds of {about}, on {machine()}, torch {torch.__version__}."
    show(Group(table, *failed, "", measured, _LEGEND))
    ours = found.found["fuse"]
    if isinstance(ours, Measured) and ours.report is not None:
        show(_gain(found, ours.report))


def _gain(found: Comparison, report: Report) -> RenderableType:
    """In words: what fuse did, and what that gave."""
    ours = found.seconds["fuse"]
    shares = [f"{ours / seconds:.2f} of {way}'s time" for way, seconds in found.seconds.items() if way != "fuse"]
    said = Text(f"{report.summary}; {' and '.join(shares)}.", "bold")
    left = [Text(str(x), "yellow") for x in unfused(report.sites)]
    return Group(said, *left, *(Text(remark, "dim") for remark in report.remarks))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{2 if seconds < 0.1 else 0}f} ms"


def _memory(peak: int | None) -> str:
    return "-" if peak is None else f"{peak / 2**20:,.1f} MB"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
