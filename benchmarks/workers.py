"""Tasks in processes of their own, so that one that fails, hangs or breaks its GPU's context costs only itself."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

NOT_RUN = "not run: "
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Task:
    """``function(*arguments)``; the function is found by name, the result is plain data. ``seconds`` is its limit."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    seconds: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """``error`` is the last line of what was raised, empty where nothing was."""

    name: str
    value: Any = None
    error: str = ""
    seconds: float = 0.0


@dataclass
class Worker:
    """A process that does one task after the other; it is started anew after one that failed."""

    _process: Any = None
    _pipe: Any = field(default=None, repr=False)

    def do(self, task: Task, until: float = float("inf")) -> Outcome:
        """``until``: a time of ``time.monotonic`` at which the task is given up, if its own limit is not over before."""
        start = time.monotonic()
        limit = min(task.seconds, until - start)
        if limit <= 0:
            return Outcome(task.name, error=NOT_RUN + "the time was over")
        if self._process is None:
            self._pipe, theirs = _spawn.Pipe()
            self._process = _spawn.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        value, error = None, f"no result within {limit:.0f} s"
        try:
            self._pipe.send(task)
            if self._pipe.poll(limit):
                value, error = self._pipe.recv()
        except (EOFError, OSError):
            error = "its process died"
        if error:
            self.stop()
        return Outcome(task.name, value, error, round(time.monotonic() - start, 3))

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def do_all(tasks: Sequence[Task], workers: int, until: float) -> list[Outcome]:
    """Every task's outcome, in their order, by so many processes at a time."""
    idle = [Worker() for _ in range(max(1, min(workers, len(tasks))))]
    everyone = list(idle)

    def one(task: Task) -> Outcome:
        worker = idle.pop()
        try:
            return worker.do(task, until)
        finally:
            idle.append(worker)

    with ThreadPoolExecutor(len(everyone)) as pool:
        outcomes = list(pool.map(one, tasks))
    for worker in everyone:
        worker.stop()
    return outcomes


def _serve(pipe: Connection) -> None:
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        try:
            reply = (task.function(*task.arguments), "")
        except BaseException as error:
            traceback.print_exc()
            reply = (None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        pipe.send(reply)
