"""fuse on a GPU: is every route right, and how fast is it beside its peers. Parts end by the clock, within nine minutes.

    python benchmarks/gpu.py [--only causal] [--parts correctness attention models] [--peers flash flex]
    python benchmarks/gpu.py --device cpu --tiny --results DIR      the same path in seconds, with the kernels of the CPU

First every named problem of the tests, in three dtypes, against float64, in many processes; beside them everything that is
timed later is compiled, so that it comes from the caches on disk. Then the rate of products, attention forward and backward
and whole models, in one process, the most telling first, as many as there is time for. Medians of rounds over all ways.
A way that fails is reported and the run goes on. Written to benchmarks/results: gpu-NAME.json, and gpu-NAME.md as a table.
A second run on the same device with the same versions goes on where that one ended, unless --anew. Exit status 1 where a route
is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_checks
import gpu_models
import torch
from gpu_report import table
from gpu_timing import device_facts, multiply_rate
from workers import NOT_RUN, Outcome, Task, Worker, do_all

PARTS = ("correctness", "attention", "models")
# Seconds from the start at which a part ends; what is left over goes to the next.
ENDS = {"correctness": 230.0, "attention": 400.0, "models": 515.0}


@dataclass
class Run:
    """What was asked, what was found so far, and by an earlier run."""

    args: argparse.Namespace
    before: dict[str, Any] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)

    def until(self, part: str) -> float:
        return self.start + ENDS[part]

    def measured(self, part: str, name: str) -> dict[str, Any] | None:
        """What an earlier run has measured."""
        return next((x for x in self.before.get(part, ()) if x["case"] == name and not x["error"]), None)

    @property
    def cases(self) -> list[gpu_attention.Case]:
        return [c for c in (gpu_attention.TINY if self.args.tiny else gpu_attention.CASES) if self.args.only in c.name]

    def timed(self, seconds: float) -> list[tuple[str, Task]]:
        """What is timed, the most telling first, and to which part it belongs; ``seconds`` of 0 only compile."""
        args, tasks = self.args, []
        for c in self.cases:
            given = (c, args.device, args.peers, c.kind != "decode", seconds)
            tasks.append(("attention", Task(c.name, gpu_attention.measure, given, 150)))
        ways = [list(w) for w in gpu_models.WAYS[: 1 if args.tiny else None]]
        for shape in gpu_models.TINY if args.tiny else gpu_models.SHAPES:
            for training in (False, True):
                name = f"{shape.model} {'training' if training else 'forward'} {shape.batch}x{shape.length}"
                given_model = (shape, training, args.device, ways, 2 * seconds)
                tasks.append(("models", Task(name, gpu_models.measure, given_model, 200)))
        return [(part, task) for part, task in tasks if part in args.parts]


def check_all(run: Run) -> None:
    """Correctness of every route; what is timed is compiled as soon as the most telling checks are done."""
    args = run.args
    known = run.before.get("correctness", {}).get("right", [])
    chosen = [c for c in gpu_checks.every(args.device) if args.only in c[1] and " ".join(c) not in known]
    checks = [
        Task(" ".join(c), gpu_checks.check, (*c, args.device), 60)
        for c in (chosen[:: max(1, len(chosen) // 3)] if args.tiny else chosen)
    ]
    warm = [] if args.tiny else [Task(t.name, compiled, (t.function, t.arguments), t.seconds) for _, t in run.timed(0)]
    if "correctness" not in args.parts:
        checks = []
    telling = sum(c[2] == gpu_checks.DTYPES[0] for c in chosen) if checks else 0
    with one_thread_each():
        outcomes = do_all([*checks[:telling], *warm, *checks[telling:]], args.workers, run.until("correctness"))
    run.found["compiled"] = [asdict(o) | {"value": None} for o in outcomes[telling : telling + len(warm)]]
    results = [*outcomes[:telling], *outcomes[telling + len(warm) :]]
    done = [o for o in results if not o.error.startswith(NOT_RUN)]
    failed = [asdict(o) for o in done if o.error]
    right = [*known, *(o.name for o in done if not o.error)]
    checked, left = len(right) + len(failed), len(results) - len(done)
    run.found["correctness"] = {"checked": checked, "failed": failed, "not checked": left, "right": right}
    print(f"correctness: {len(right)} of {checked} are right, {left} were not checked")
    for outcome in failed:
        print(f"  {outcome['name']}: {outcome['error']}")


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """``function`` beside others on one device: what needs more memory than this fails, after it was compiled."""
    if torch.cuda.is_available():
        share = 0.04 if isinstance(arguments[0], gpu_attention.Case) else 0.3 if arguments[1] else 0.1
        torch.cuda.set_per_process_memory_fraction(share)
    function(*arguments)


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """For processes that are started here: Inductor and OpenMP would take all processors in each."""
    names = ("TORCHINDUCTOR_COMPILE_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= dict.fromkeys(names, "1")
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def time_all(run: Run) -> None:
    """One process at a time has the device."""
    args, worker = run.args, Worker()
    size = 64 if args.tiny else 8192
    dtype = "float32" if args.tiny else "bfloat16"
    rate = worker.do(Task("products", multiply_rate, (args.device, dtype, size)))
    run.found["products"] = {"dtype": dtype, "size": size, "rate": rate.value, "error": rate.error}
    run.found["attention"], run.found["models"] = [], []
    for part, task in run.timed(0.01 if args.tiny else 1.0):
        found = run.measured(part, task.name)
        if found is None:
            outcome = worker.do(task, run.until(part))
            found = described(task, outcome)
            print(f"{part}: {task.name}: {outcome.error or 'measured'} ({outcome.seconds:.1f} s)", flush=True)
        run.found[part].append(found)
    again = worker.do(Task("products", multiply_rate, (args.device, dtype, size)))
    run.found["products"]["rate at the end"] = again.value
    run.found["device at the end"] = worker.do(Task("device", device_facts, (args.device,))).value
    worker.stop()


def described(task: Task, outcome: Outcome) -> dict[str, Any]:
    what = task.arguments[0]
    facts = {"operations": what.operations, "bytes": what.bytes_read} if isinstance(what, gpu_attention.Case) else {}
    return {
        "case": task.name,
        **asdict(what),
        **facts,
        "error": outcome.error,
        "took": outcome.seconds,
        **(outcome.value or {}),
    }


def earlier(path: Path, versions: dict[str, str]) -> dict[str, Any]:
    """What a run with these versions has found; empty if there was none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("versions") == versions else {}


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "pytorch-triton", "transformers", "torch-fuse", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two cases of each part, small")
    parser.add_argument("--only", default="", help="cases and problems whose name contains this")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="*", choices=gpu_attention.PEERS, default=list(gpu_attention.PEERS))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that check and compile")
    parser.add_argument("--anew", action="store_true", help="forget what an earlier run has found")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --device cpu --tiny goes the same path without one")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    run = Run(args)
    run.found = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(),
                 "device": device_facts(args.device)}  # fmt: skip
    print(json.dumps(run.found, indent=1))
    name = re.sub(r"\W+", "-", run.found["device"]["device"]).strip("-")
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.anew:
        run.before = earlier(args.results / f"gpu-{name}.json", run.found["versions"])
    try:
        check_all(run)
        time_all(run)
    finally:  # what was found is kept whatever happens
        run.found["seconds"] = round(time.monotonic() - run.start, 1)
        text = table(run.found)
        (args.results / f"gpu-{name}.json").write_text(json.dumps(run.found, indent=1) + "\n")
        (args.results / f"gpu-{name}.md").write_text(text)
        print(f"\n{text}\nkept in {args.results / f'gpu-{name}.json'}")
    return int(bool(run.found["correctness"]["failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
