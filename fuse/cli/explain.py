"""explain: what fuse would do with a model."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.text import Text

from fuse.cli import asked
from fuse.cli.console import is_terminal, show, work
from fuse.cli.table import table
from fuse.errors import CallFailed, CannotWrite, FuseError
from fuse.failure import told
from fuse.report.report import Report, explained
from fuse.report.required import unfused


def run(args: argparse.Namespace) -> int:
    if args.html is not None:
        _check_writable(args.html)
    report = _report(args)
    if args.html is not None:
        print(report.to_html(args.html), file=sys.stderr if args.json or args.passes else sys.stdout)
    if args.passes is not None:
        print(report.passes(args.passes) or f"no site {args.passes}: {report.summary}")
    elif args.json:
        print(report.to_json())
    elif args.html is None:
        show(table(report) if is_terminal() else Text(str(report)))
    return _require_all(report) if args.require_all else 0


def _report(args: argparse.Namespace) -> Report:
    chosen = asked.options(args)
    if "TORCH_LOGS" not in os.environ:  # torch logs at length what becomes one line here
        logging.getLogger("torch").setLevel(logging.CRITICAL)
    with work() as say, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        say(f"loading {args.model}")
        call = asked.loaded(args, weights=False)
        say(f"reading {args.model}")
        try:
            with torch.set_grad_enabled(args.train), _few_collections():
                return explained(chosen, call.model, call.args, call.kwargs)
        except FuseError:
            raise
        except Exception as error:
            raise CallFailed(error=told(error), hint=_hint(args.model)) from error


def _hint(name: str) -> str:
    return "" if ":" in name else f" Other inputs: write a function that returns them beside a {name}, and name that."


@contextmanager
def _few_collections() -> Iterator[None]:
    """Tracing makes many objects and few cycles: looking for them as often as Python does took a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _require_all(report: Report) -> int:
    """Whether all attention is fused, and there is some; says what is not, and what would change that."""
    problems = [str(x) for x in unfused(report.sites)]
    if not report.sites:
        problems.append("no attention was found")
    problems += [f"a graph was not looked into: {why}" for why in dict.fromkeys(report.unread)]
    problems += [report.note] if report.note else []
    if problems:
        print("--require-all:", *problems, sep="\n  ", file=sys.stderr)
    return int(bool(problems))


def _check_writable(file: Path) -> None:
    """Before long work. Raises CannotWrite."""
    if not file.parent.is_dir():
        raise CannotWrite(file=file, why=f"there is no folder {file.parent}", remedy=f"Create it (mkdir -p {file.parent})")
    if file.is_dir():
        raise CannotWrite(file=file, why="it is a folder", remedy=f"Write {file / 'report.html'}, say")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CannotWrite(file=file, why="it is not yours to write", remedy="Name another")
