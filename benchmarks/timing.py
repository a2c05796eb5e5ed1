"""Ways to compute the same, timed in one interleaved run; and where results are kept."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import machine
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Times:
    """Medians in seconds: processor time of all threads, and wall time."""

    processor: float
    wall: float


def working(runs: dict[str, Callable[[], Run | None]]) -> dict[str, Run]:
    """Every way, made and run once. None is no way; one that fails is left out, and said to be."""
    found: dict[str, Run] = {}
    for name, make in runs.items():
        try:
            run = make()
            if run is not None:
                run()
                found[name] = run
        except Exception as error:  # a peer that cannot compute a case is a result, not a failure of the benchmark
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
    return found


@dataclass(frozen=True)
class Repeated:
    """``count`` calls as one. One more goes before them, untimed: it finds in the caches what another way has left there."""

    run: Run
    count: int

    def __call__(self) -> Tensor:
        for _ in range(self.count):
            out = self.run()
        return out


def measure(runs: dict[str, Run], seconds: float, enough: float = float("inf")) -> dict[str, Times]:
    """Rounds over all ways until ``seconds`` are over, at least three; a way that has taken ``enough`` seconds sits out.

    Each round has an order of its own: who comes after much memory was given back has it to fetch again.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    start, order = time.perf_counter(), random.Random(0)
    while time.perf_counter() - start < seconds or len(taken["fuse"]) < 3:
        for name, run in order.sample(list(runs.items()), len(runs)):
            if name == "fuse" or sum(wall for _, wall in taken[name]) < enough:
                if isinstance(run, Repeated):
                    run.run()
                processor, wall = time.process_time(), time.perf_counter()
                run()
                taken[name].append((time.process_time() - processor, time.perf_counter() - wall))
    return {name: Times(*(statistics.median(column) for column in zip(*rounds, strict=True))) for name, rounds in taken.items()}


def is_whole(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Whether the run is one to keep: nothing was chosen but the number of threads."""
    return all(value == parser.get_default(name) for name, value in vars(args).items() if name != "threads")


def keep(benchmark: str, facts: dict[str, object], results: list[dict[str, object]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}-{machine.slug()}.json"
    path.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    print(f"\nkept in {path}")
