"""Attention in other forms than one softmax and one result, unchanged, by eager, Inductor and fuse in one interleaved run.

    python benchmarks/forms.py [--threads 1] [--lengths 512 2048] [--forms sigmoid weights] [--dtypes float32]

Without a softmax: sigmoid attention, squared ReLU, retention, causal linear attention. Two softmaxes under one product:
differential attention. A result with more beside it: the weights, their mean over heads, parts that are merged by
log-sum-exp. Milliseconds of processor time per head, medians, of the result and of a step of training (forward and backward);
results and gradients are compared with eager's. A way is left out where its scores would need more than SCORES_GB. Exit
status 1 where fuse is slower than the faster of both; a full run is kept under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import machine
import torch
import torch.nn.functional as F
from timing import Run, is_whole, keep, measure, working
from torch import Tensor

import fuse

WIDTH = 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
DTYPES = ("float32", "bfloat16")
WAYS = ("fuse", "eager", "inductor")
SCORES_GB = 6.0  # for scores, probabilities and their gradients
LEAST = 0.95  # times that the faster of the others takes of what fuse does
Results = tuple[Tensor, ...]
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Results]] = {}


def form(f: Callable[[Tensor, Tensor, Tensor], Results]) -> Callable[[Tensor, Tensor, Tensor], Results]:
    FORMS[f.__name__] = f
    return f


def seen(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return i <= i[:, None]


def causal(s: Tensor) -> Tensor:
    return s.masked_fill(~seen(s), -math.inf)


@form
def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Results:
    return (torch.sigmoid(q @ k.mT * WIDTH**-0.5 - math.log(k.shape[-2])) @ v,)


@form
def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Results:
    return (F.relu(q @ k.mT * WIDTH**-0.5).square().masked_fill(~seen(q), 0) @ v / k.shape[-2],)


@form
def retention(q: Tensor, k: Tensor, v: Tensor) -> Results:
    i = torch.arange(q.shape[-2])
    d = i[:, None] - i
    return ((q @ k.mT * torch.where(d >= 0, 0.97 ** d.clamp(min=0), 0.0).to(q.dtype)) @ v,)


@form
def linear(q: Tensor, k: Tensor, v: Tensor) -> Results:
    s = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * seen(q)
    return (s @ v / s.sum(-1, keepdim=True),)


@form
def differential(q: Tensor, k: Tensor, v: Tensor) -> Results:
    half = WIDTH // 2
    one, two = (causal(a @ b.mT * half**-0.5).softmax(-1) for a, b in zip(q.split(half, -1), k.split(half, -1), strict=True))
    return ((one - 0.3 * two) @ v,)


@form
def weights(q: Tensor, k: Tensor, v: Tensor) -> Results:
    p = causal(q @ k.mT * WIDTH**-0.5).softmax(-1)
    return p @ v, p


@form
def mean_weights(q: Tensor, k: Tensor, v: Tensor) -> Results:
    p = causal(q @ k.mT * WIDTH**-0.5).softmax(-1)
    return p @ v, p.mean(1)


@form
def merged(q: Tensor, k: Tensor, v: Tensor) -> Results:
    half = k.shape[-2] // 2
    parts = [(q @ a.mT * WIDTH**-0.5, b) for a, b in zip(k.split(half, -2), v.split(half, -2), strict=True)]
    sums = [s.logsumexp(-1, keepdim=True) for s, _ in parts]
    whole = torch.logaddexp(*sums)
    return (sum((s.softmax(-1) @ b) * (of - whole).exp() for (s, b), of in zip(parts, sums, strict=True)),)


# -------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    form: str
    length: int
    dtype: str

    @property
    def heads(self) -> int:
        return max(2, min(8, 16384 // self.length))

    def fits(self, training: bool) -> bool:
        held = (8 if training else 4) * (4 if self.dtype == "float32" else 2)
        return held * self.heads * self.length**2 < SCORES_GB * 2**30


@dataclass(frozen=True)
class Row:
    """Seconds of processor time per head; ``sites``: fused, and found. ``difference``: the largest from eager's result and
    gradients, as a share of the largest number."""

    case: Case
    sites: tuple[int, int]
    forward: dict[str, float]
    training: dict[str, float]
    difference: float

    @property
    def ratios(self) -> tuple[float, float]:
        return _ratio(self.forward), _ratio(self.training)


def _ratio(times: dict[str, float]) -> float:
    return min((t for way, t in times.items() if way != "fuse"), default=math.nan) / times["fuse"]


def made(case: Case, way: str, training: bool) -> Run | None:
    """The results side by side, or the gradients of a step of training."""
    if way != "fuse" and not case.fits(training):
        return None
    torch.manual_seed(0)
    shape, dtype = (1, case.length, case.heads, WIDTH), getattr(torch, case.dtype)
    tensors = [torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3)]
    program = FORMS[case.form]
    run = program if way == "eager" else torch.compile(program, backend=way, dynamic=False)
    if not training:
        return torch.no_grad()(lambda: _joined(run(*tensors)))
    leaves = [t.clone().requires_grad_() for t in tensors]
    grads = [torch.randn(x.shape, dtype=dtype) for x in run(*leaves)]
    return lambda: _joined(torch.autograd.grad(run(*leaves), leaves, grads))


def _joined(found: Results) -> Tensor:
    """The first alone: what joins large ones would be timed with them."""
    return found[0]


def difference(ways: dict[str, Run]) -> float:
    results = {name: run().float() for name, run in ways.items()}
    of = results.get("eager", results["fuse"])
    return max(float((x - of).abs().max() / of.abs().max()) for x in results.values())


def run_case(case: Case, seconds: float) -> Row:
    times, differences, sites = [], [], (0, 0)
    for training in (False, True):
        torch._dynamo.reset()
        fuse.reset()
        ways = working({way: partial(made, case, way, training) for way in WAYS})
        report = fuse.report()
        sites = (report.fused, len(report.sites))
        times.append({n: t.processor / case.heads for n, t in measure(ways, seconds, enough=seconds).items()})
        differences.append(difference(ways))
    return Row(case, sites, times[0], times[1], max(differences))


# ------------------------------------------------------------------------------------------------------------ results


def shown(row: Row) -> str:
    cells = ""
    for times, ratio in zip((row.forward, row.training), row.ratios, strict=True):
        cells += "".join(f"{times.get(way, math.nan) * 1e3:10.2f}" for way in WAYS) + f"{ratio:7.2f}x"
    case, fused = row.case, f"{row.sites[0]}/{row.sites[1]}"
    return f"{case.dtype:9}{case.form:13}{case.length:6}{case.heads:6}{fused:>6}{cells}   {row.difference:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of one case, result and training each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine.facts()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    names = "".join(f"{way:>10}" for way in WAYS)
    print(f"\n{'ms per head':22}{'S':>6}{'heads':>6}{'fused':>6}{names}{'':8}{names}{'':8}   difference")
    rows = []
    for case in (Case(f, n, d) for d in args.dtypes for f in args.forms for n in args.lengths):
        rows.append(run_case(case, args.seconds))
        print(shown(rows[-1]), flush=True)
    found = [r for row in rows for r in row.ratios if not math.isnan(r)]
    print(f"\nleast (faster of eager and Inductor) / fuse: {min(found):.2f}")
    if is_whole(parser, args):
        keep("forms", facts, [asdict(row) for row in rows])
    return int(min(found) < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
