"""Attention whose weights, or whose log-sum-exp, are results too: fuse beside eager and Inductor, in one interleaved run.

    python benchmarks/weights.py [--threads 2] [--only mean] [--lengths 2048]

float32, batch 1, heads of 64 features. A case is what a model returns beside the result: its weights under a causal mask or
none, their mean over heads as nn.MultiheadAttention has it, the log-sum-exp of the scores; and a training step whose loss reads
the result alone, or its weights. Kernels are taken as they are (qualify="never"). Prints medians of wall time, and how many
times as long the others take. The result is kept under benchmarks/results/. Exit status 1 where fuse misses a bar.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from machine import facts
from timing import Run, Times, is_whole, keep, measure
from torch import Tensor, nn

Program = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
FEATURES = 64


def scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    s = q @ k.mT * FEATURES**-0.5
    at = torch.arange(s.shape[-1])
    return s.masked_fill(at > at[:, None], float("-inf")) if causal else s


def weights(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    p = scores(q, k, causal).softmax(-1)
    return p @ v, p


def causal_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return weights(q, k, v, causal=True)


def mean_of_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, p = weights(q, k, v)
    return out, p.mean(1)


def logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k, causal=False)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of the keys, each by itself, as ring and cascade attention write it."""
    parts = [logsumexp(q, a, b) for a, b in zip(k.chunk(2, -2), v.chunk(2, -2), strict=True)]
    whole = torch.logaddexp(*(lse for _, lse in parts))
    first, second = (out * (lse - whole).exp()[..., None] for out, lse in parts)
    return first + second, whole


class Multihead(nn.Module):
    """nn.MultiheadAttention as it is called by default, with all its projections."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(heads * FEATURES, heads, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        x = q.transpose(1, 2).flatten(2)
        result: tuple[Tensor, Tensor] = self.attention(x, x, x)
        return result


@dataclass(frozen=True)
class Case:
    """``bars``: how many times as long as fuse eager has to take, by length."""

    name: str
    program: Callable[[int], Program]
    trained: str = ""
    heads: int = 8
    bars: dict[int, float] = field(default_factory=dict)


def of(program: Program) -> Callable[[int], Program]:
    return lambda heads: program


CASES = (
    Case("weights", of(weights), bars={2048: 1.5}),
    Case("weights, 12 heads", of(weights), heads=12, bars={2048: 1.5}),
    Case("causal weights", of(causal_weights), bars={2048: 1.5}),
    Case("mean over heads", of(mean_of_weights), bars={2048: 1.5}),
    Case("nn.MultiheadAttention", Multihead, bars={2048: 1.5}),
    Case("log-sum-exp", of(logsumexp), bars={2048: 1.5}),
    Case("parts merged by log-sum-exp", of(merged), bars={2048: 1.5}),
    Case("training by the result", of(causal_weights), trained="result"),
    Case("training by both", of(causal_weights), trained="both"),
)
LENGTHS = (512, 1024, 2048)


def run(program: Program, inputs: Sequence[Tensor], trained: str) -> Run:
    if not trained:
        return lambda: torch.no_grad()(program)(*inputs)[0]

    def step() -> Tensor:
        out, p = program(*inputs)
        loss = out.square().sum() + (p.square().sum() if trained == "both" else 0)
        return torch.autograd.grad(loss, inputs)[0]

    return step


def measured(case: Case, length: int, seconds: float) -> dict[str, Times]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [torch.randn(1, case.heads, length, FEATURES, requires_grad=bool(case.trained)) for _ in range(3)]
    program = case.program(case.heads)
    ways = {"fuse": torch.compile(program, backend="fuse"), "eager": program, "inductor": torch.compile(program)}
    runs = {name: run(way, inputs, case.trained) for name, way in ways.items()}
    for each in runs.values():
        each()
        each()
    return measure(runs, seconds)


def report(case: Case, length: int, times: dict[str, Times]) -> dict[str, object]:
    own = times["fuse"].wall
    ratios = {name: found.wall / own for name, found in times.items() if name != "fuse"}
    bar = case.bars.get(length)
    missed = bar is not None and ratios["eager"] < bar
    said = "  ".join(f"{name} {found.wall * 1e3:7.1f} ms" for name, found in times.items())
    beside = "  ".join(f"{name} / fuse {ratio:.2f}" for name, ratio in ratios.items())
    print(f"{case.name:28} {length:5}  {said}   {beside}{'' if bar is None else f'   at least {bar}'}{' missed' * missed}")
    walls = {name: found.wall for name, found in times.items()}
    return {"case": case.name, "length": length, "seconds": walls, "ratios": ratios, "bar": bar, "missed": missed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = facts()
    print(", ".join(f"{name}: {value}" for name, value in found.items()))
    results = [
        report(case, length, measured(case, length, args.seconds))
        for case in CASES
        if args.only in case.name
        for length in args.lengths
    ]
    if is_whole(parser, args):
        keep("weights", found, results)
    return int(any(r["missed"] for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
