"""The same FlexAttention program with backend="inductor" and backend="fuse", in one interleaved run; and a step of training.

    python benchmarks/flex.py [--threads 1] [--lengths 1024 4096] [--programs causal window] [--dtypes float32]

The program is not changed between them: flex_attention with a score function, and a BlockMask made beforehand. A step of
training is forward and backward; Inductor has no backward on CPUs, so eager stands beside it: two products, a softmax, and
the mask or the biases as tensors made beforehand, left out where it would need more than EAGER_GB. Milliseconds of processor
time per head, medians; results and gradients are compared with each other. Exit status 1 where fuse's forward is not twice as
fast; a full run is kept under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import machine
import torch
from timing import Run, is_whole, keep, measure, working
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

WIDTH = 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
DTYPES = ("float32", "bfloat16")
EAGER_GB = 3.0  # for scores, probabilities and their gradients
LEAST = 2.0  # times that Inductor takes of what fuse does
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Program:
    """``mask`` and ``score``: from (length, heads) to what flex_attention takes, or None."""

    mask: Callable[[int, int], Function] | None = None
    score: Callable[[int, int], Function] | None = None


def causal(length: int, heads: int) -> Function:
    return lambda b, h, q, k: q >= k


def documents(length: int, heads: int) -> Function:
    """A document every 512 positions or so, of any length."""
    ids = torch.randint(length // 512, (length,), generator=torch.Generator().manual_seed(0)).sort()[0]
    return lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k)


def window(length: int, heads: int) -> Function:
    return lambda b, h, q, k: (q >= k) & (q - k < 256)


def alibi(length: int, heads: int) -> Function:
    slopes = 2.0 ** (-8.0 * (torch.arange(heads) + 1) / heads)
    return lambda s, b, h, q, k: s + slopes[h] * (k - q)


def soft_cap(length: int, heads: int) -> Function:
    return lambda s, b, h, q, k: 20 * torch.tanh(s / 20)


PROGRAMS = {
    "causal": Program(causal), "documents": Program(documents), "window": Program(window), "alibi": Program(causal, alibi),
    "soft-cap": Program(causal, soft_cap),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    program: str
    length: int
    dtype: str

    @property
    def heads(self) -> int:
        return max(1, min(8, 32768 // self.length))

    @property
    def fits_eager(self) -> bool:
        return 4 * (4 if self.dtype == "float32" else 2) * self.heads * self.length**2 < EAGER_GB * 2**30


@dataclass(frozen=True)
class Row:
    """``forward`` and ``training``: seconds of processor time per head. ``difference``: the largest, from the other's result
    and from eager's gradients, as a share of the largest number."""

    case: Case
    forward: dict[str, float]
    training: dict[str, float]
    difference: float

    @property
    def ratio(self) -> float:
        return self.forward.get("inductor", math.nan) / self.forward["fuse"]


# -------------------------------------------------------------------------------------------------------------- ways


@dataclass(frozen=True)
class Made:
    """The tensors, (1, heads, length, WIDTH), and the program for them, by FlexAttention and written out."""

    tensors: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    flex: Function
    eager: Function


def made(case: Case) -> Made:
    torch.manual_seed(0)
    program, length, heads = PROGRAMS[case.program], case.length, case.heads
    shape, dtype = (1, length, heads, WIDTH), getattr(torch, case.dtype)
    query, key, value, grad = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(4))
    mask = program.mask and program.mask(length, heads)
    score = program.score and program.score(length, heads)
    blocks = mask and create_block_mask(mask, None, None, length, length, device="cpu")

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h, row, column = (torch.arange(n).view(size) for n, size in ((heads, (-1, 1, 1)), (length, (-1, 1)), (length, (-1,))))
        scores = q @ k.mT * WIDTH**-0.5
        scores = score(scores, 0, h, row, column).to(dtype) if score else scores
        return (scores.masked_fill(~mask(0, h, row, column), -math.inf) if mask else scores).softmax(-1) @ v

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=score, block_mask=blocks)

    return Made((query, key, value), grad, flex, eager)


def forward(case: Case, backend: str) -> Run:
    x = made(case)
    run = torch.compile(x.flex, backend=backend, dynamic=False)

    def call() -> Tensor:
        with torch.inference_mode():
            return run(*x.tensors)  # type: ignore[no-any-return]

    return call


def step(case: Case, way: str) -> Run | None:
    """Forward and backward; the gradients side by side."""
    if way == "eager" and not case.fits_eager:
        return None
    x = made(case)
    leaves = [t.clone().requires_grad_() for t in x.tensors]
    run = x.eager if way == "eager" else torch.compile(x.flex, backend="fuse", dynamic=False)
    return lambda: torch.cat(torch.autograd.grad(run(*leaves), leaves, x.grad))


def difference(ways: dict[str, Run]) -> float:
    results = [run().float() for run in ways.values()]
    return max((float((x - results[0]).abs().max() / results[0].abs().max()) for x in results[1:]), default=0.0)


def run_case(case: Case, seconds: float) -> Row:
    torch._dynamo.reset()
    ways = working({"fuse": lambda: forward(case, "fuse"), "inductor": lambda: forward(case, "inductor")})
    steps = working({"fuse": lambda: step(case, "fuse"), "eager": lambda: step(case, "eager")})
    times = [{n: t.processor / case.heads for n, t in measure(w, seconds, enough=seconds).items()} for w in (ways, steps)]
    return Row(case, times[0], times[1], max(difference(ways), difference(steps)))


# ------------------------------------------------------------------------------------------------------------ results


def shown(row: Row) -> str:
    numbers = (row.forward["fuse"], row.forward.get("inductor", math.nan))
    training = (row.training["fuse"], row.training.get("eager", math.nan))
    cells = "".join(f"{t * 1e3:10.2f}" for t in numbers) + f"{row.ratio:7.1f}x" + "".join(f"{t * 1e3:10.2f}" for t in training)
    return f"{row.case.dtype:9}{row.case.program:11}{row.case.length:6}{row.case.heads:6}{cells}   {row.difference:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of one case, forward and training each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine.facts()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"\n{'ms per head':20}{'S':>6}{'heads':>6}{'fuse':>10}{'inductor':>10}{'':8}{'step':>10}{'eager':>10}   difference")
    rows = []
    for case in (Case(p, n, d) for d in args.dtypes for p in args.programs for n in args.lengths):
        rows.append(run_case(case, args.seconds))
        print(shown(rows[-1]), flush=True)
    least = min(rows, key=lambda row: row.ratio)
    print(f"\nleast inductor / fuse: {least.ratio:.2f} ({least.case.dtype} {least.case.program} at {least.case.length})")
    if is_whole(parser, args):
        keep("flex", facts, [asdict(row) for row in rows])
    return int(not least.ratio >= LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
