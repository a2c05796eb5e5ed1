"""The ways, each in its process, and rounds of calls in which they take turns."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from fuse.bench.case import Case, Failed, Measured
from fuse.bench.worker import CALL, EAGER, FUSE, begin
from fuse.errors import FuseError

WAYS = (EAGER, "inductor", FUSE)
_PATIENCE = 2.0  # seconds
Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """By way: what was measured, and the median seconds of a call of those that did not fail."""

    found: Mapping[str, Measured | Failed]
    seconds: Mapping[str, float]


class Ways:
    """A context in which there is a process for each way, ready to compare one case after the other.

    cold  each has caches of its own, which are empty at first; else what one of them keeps is there for the next
    """

    def __init__(self, cold: bool = False) -> None:
        self._cold = cold

    def __enter__(self) -> Ways:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        caches = {way: Path(self._folder.name) / way if self._cold else None for way in WAYS}
        self._workers = {way: _Worker(way, caches[way]) for way in WAYS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers.values():
            worker.end()
        self._folder.cleanup()

    def compare(self, case: Case, rounds: int, say: Say = lambda text: None) -> Comparison:
        """One after the other, since calls would disturb each other's time. ``say`` is told each of len(WAYS) + rounds steps.

        Raises what the case raises as a FuseError.
        """
        found: dict[str, Measured | Failed] = {}
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                say(f"{way}: first call")
                found[way] = self._workers[way].ask((case, Path(folder) / "exact.pt"))
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}")
            for way in _running(found):
                answer = self._workers[way].ask(CALL)
                if isinstance(answer, Failed):
                    found[way] = answer
                else:
                    seconds[way].append(answer)
        for way in _running(found):
            self._workers[way].tell("done")
        return Comparison(found, {way: statistics.median(seconds[way]) for way in _running(found)})


def _running(found: Mapping[str, Measured | Failed]) -> list[str]:
    return [way for way, result in found.items() if isinstance(result, Measured)]


class _Worker:
    def __init__(self, way: str, caches: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=begin, args=(theirs, way, caches), daemon=True)
        self._process.start()
        theirs.close()  # else the death of the worker would go unnoticed

    def ask(self, what: object) -> Any:
        try:
            self._pipe.send(what)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            return Failed("its process died, as where memory is short")
        if isinstance(answer, FuseError):
            raise answer
        return answer

    def tell(self, what: object) -> None:
        self._pipe.send(what)

    def end(self) -> None:
        """Of itself, if it is not in the middle of something."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()
