"""Is there a call that is slower with fuse than without? A grid of sizes, masks and passes, each beside the best of the rest.

    python benchmarks/never_slower.py [--threads 1] [--seconds 0.4] [--minutes 30] [--seed 0] [--dtypes float32 bfloat16]

A point is one graph of eight attentions one after the other (of one, where that is much work), as the layers of a model have
them. It is compiled with fuse as a user has it, qualification included; with Inductor; and run operator by operator, with SDPA
and written out. Rounds take all in turn; a ratio is the time of the fastest of the others over fuse's: processor time on one
thread, wall time on more. Points come in an order that the seed shuffles, so that the first of them are a sample of the grid;
after ``--minutes`` no other is begun. What is below 0.95 is measured once more, three times as long, and told at the end.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

os.environ["FUSE_QUALIFY"] = "once"  # what a user has

import machine
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

BAR = 0.95
LAYERS = 8
_MUCH = 2e9  # multiply-adds of eight layers
DTYPES = ("float32", "bfloat16")
WIDTHS = (32, 64, 128, 256)
HEADS = ((1, 2), (4, 12))
LENGTHS = (1, 8, 32, 49, 64, 128, 197, 256, 512, 1024, 2048, 4096)
CACHES = (16, 64, 256, 1024, 4096)
MASKS = ("none", "causal", "padding", "bias")
_MOST = 3e10  # multiply-adds of one call: more takes minutes, and tells nothing that the largest below it does not


@dataclass(frozen=True)
class Point:
    """``queries`` of ``heads`` in ``batch`` on ``keys``; ``training``: with gradients of query, key and value."""

    dtype: str
    width: int
    batch: int
    heads: int
    queries: int
    keys: int
    mask: str
    training: bool

    @property
    def work(self) -> float:
        return 2.0 * self.batch * self.heads * self.queries * self.keys * self.width * (3.5 if self.training else 1)

    @property
    def layers(self) -> int:
        return LAYERS if self.work * LAYERS < _MUCH else 1

    def __str__(self) -> str:
        size = f"({self.batch}, {self.heads}, {self.queries}, {self.keys})"
        return f"{self.dtype:9} D={self.width:<4}{size:21}{self.mask:8} {'training' if self.training else 'forward'}"


def grid() -> list[Point]:
    square = [(n, n) for n in LENGTHS]
    decoding = [(q, n) for q in (1, 4) for n in CACHES]
    found = [
        Point(dtype, width, batch, heads, queries, keys, mask, training)
        for dtype, width, (batch, heads), (queries, keys), mask, training in itertools.product(
            DTYPES, WIDTHS, HEADS, square + decoding, MASKS, (False, True)
        )
        if queries == keys or (mask in ("none", "padding") and not training)
    ]
    return [p for p in found if p.work < _MOST]


@dataclass(frozen=True)
class Inputs:
    """Heads lie beside features, as models have them. ``mask``: of the kind of the point, None where SDPA needs none."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    @staticmethod
    def of(p: Point) -> Inputs:
        dtype: torch.dtype = getattr(torch, p.dtype)

        def heads(length: int) -> Tensor:
            return torch.randn(p.batch, length, p.heads, p.width).to(dtype).transpose(1, 2).requires_grad_(p.training)

        mask = None
        if p.mask == "padding":  # the last of a batch is short by a quarter
            lengths = torch.full((p.batch, 1, 1, 1), p.keys)
            lengths[-1] = max(1, p.keys - p.keys // 4)
            mask = torch.arange(p.keys) < lengths
        if p.mask == "bias":
            mask = torch.randn(1, p.heads, p.queries, p.keys).to(dtype)
        return Inputs(heads(p.queries), heads(p.keys), heads(p.keys), mask)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


def called(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)


def written(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    elif mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def stack(p: Point, attend: Attend) -> Callable[[Inputs], Tensor]:
    """The attentions of a point, each of what the one before gave."""

    def run(x: Inputs) -> Tensor:
        hidden = x.query
        for _ in range(p.layers):
            hidden = attend(hidden, x.key, x.value, x.mask, p.mask == "causal")
        return hidden

    return run


def way(p: Point, x: Inputs, run: Callable[[Inputs], Tensor], backend: str) -> timing.Run:
    compiled = torch.compile(run, backend=backend, dynamic=False)
    if not p.training:
        return lambda: compiled(x)
    grad = torch.ones_like(x.query)
    return lambda: torch.autograd.grad(compiled(x), (x.query, x.key, x.value), grad)[0]


def measured(p: Point, threads: int, seconds: float) -> tuple[float, dict[str, float]]:
    """The ratio, and microseconds of every way."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = Inputs.of(p)
    kinds = {"fuse": (called, "fuse"), "Inductor": (called, "inductor"), "SDPA": (called, "eager"), "eager": (written, "eager")}
    with torch.set_grad_enabled(p.training):
        runs = {name: way(p, x, stack(p, attend), backend) for name, (attend, backend) in kinds.items()}
        for run in runs.values():
            run(), run()
        begin = time.perf_counter()
        runs["fuse"]()
        count = max(1, int(2e-3 / (time.perf_counter() - begin)))  # of a round: some milliseconds
        runs = {name: timing.Repeated(run, count) for name, run in runs.items()}
        ratio, found = _timed(runs, threads, seconds)
        if ratio < BAR:
            ratio, found = _timed(runs, threads, 3 * seconds)
    return ratio, {name: t / count * 1e6 for name, t in found.items()}


def _timed(runs: dict[str, timing.Run], threads: int, seconds: float) -> tuple[float, dict[str, float]]:
    times = timing.measure(runs, seconds, enough=3 * seconds)
    found = {name: t.processor if threads == 1 else t.wall for name, t in times.items()}
    return min(t for name, t in found.items() if name != "fuse") / found["fuse"], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each point")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    points = [p for p in grid() if p.dtype in args.dtypes]
    random.Random(args.seed).shuffle(points)
    facts, results, end = machine.facts(), [], time.monotonic() + 60 * args.minutes
    print(facts)
    for p in points:
        if time.monotonic() > end:
            break
        ratio, microseconds = measured(p, args.threads, args.seconds)
        results.append(asdict(p) | {"ratio": ratio, "us": microseconds})
        times = ", ".join(f"{name} {t:.0f}" for name, t in microseconds.items())
        print(f"{p}  {ratio:5.2f}  ({times} us)", flush=True)
    told(points, results)
    args.minutes = parser.get_default("minutes")  # part of the grid is a sample of it
    if timing.is_whole(parser, args):
        timing.keep("never_slower", facts, results)


def told(points: list[Point], results: list[dict[str, object]]) -> None:
    ratios = sorted(float(str(r["ratio"])) for r in results)
    below = [(p, r["ratio"]) for p, r in zip(points, results, strict=False) if float(str(r["ratio"])) < BAR]
    print(
        f"\n{len(ratios)} of {len(points)} points; below {BAR}: {len(below)}; median {statistics.median(ratios):.2f}; closest:"
    )
    for p, ratio in sorted(zip(points, (float(str(r["ratio"])) for r in results), strict=False), key=lambda x: x[1])[:20]:
        print(f"{p}  {ratio:5.2f}")


if __name__ == "__main__":
    main()
