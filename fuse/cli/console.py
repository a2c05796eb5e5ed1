"""What is printed: coloured and as wide as there is room where a terminal reads it, plain elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

Say = Callable[[str], None]
_WIDE = 10_000  # columns of what no terminal has to break into lines


def is_terminal() -> bool:
    return Console().is_terminal


def show(what: RenderableType) -> None:
    if is_terminal():
        Console(highlight=False, markup=False, emoji=False).print(what)
        return
    plain = Console(file=io.StringIO(), width=_WIDE, highlight=False, markup=False, emoji=False)
    with plain.capture() as captured:
        plain.print(what)
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n")


@contextmanager
def work(steps: int | None = None) -> Iterator[Say]:
    """Gives what says, on stderr, which step of long work begins: a line that moves, a bar where the number of ``steps`` is
    known; where no terminal reads it, a line each.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: print(f"{text} …", file=sys.stderr, flush=True)
        return
    bar: tuple[ProgressColumn, ...] = (BarColumn(), TaskProgressColumn()) if steps else ()
    shown = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *bar, TimeElapsedColumn())
    with Progress(*shown, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps, completed=-1)
        yield lambda text: progress.update(task, description=text, advance=1)
