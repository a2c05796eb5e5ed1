"""Packed sequences by varlen_attn with backend="fuse", beside what else CPUs have for them, in one interleaved run.

    python benchmarks/varlen.py [--threads 1] [--tokens 8192] [--documents 512] [--windows causal full] [--dtypes float32]

PyTorch has no kernel for varlen_attn on CPUs. Beside fuse stand a loop over documents that calls SDPA for each, and one call
of SDPA with a dense mask made beforehand. Documents are about as long as asked, none like the other. A step of training is
forward and backward. Milliseconds of processor time, medians; results and gradients are compared with each other. A full run
is kept under benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import machine
import torch
from timing import Run, is_whole, keep, measure, working
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

HEADS, WIDTH = 8, 64
WINDOWS = {"causal": (-1, 0), "full": (-1, -1)}
DTYPES = ("float32", "bfloat16")
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    window: str
    dtype: str
    tokens: int
    documents: int

    def ends(self) -> list[int]:
        """Of documents, between half and one and a half times as long as asked."""
        generator = torch.Generator().manual_seed(0)
        ends = [0]
        while ends[-1] < self.tokens:
            length = self.documents // 2 + int(torch.randint(self.documents, (), generator=generator))
            ends.append(min(ends[-1] + length, self.tokens))
        return ends


@dataclass(frozen=True)
class Row:
    """``forward`` and ``training``: seconds of processor time. ``difference``: the largest, from fuse's numbers, as a share of
    the largest of them."""

    case: Case
    forward: dict[str, float]
    training: dict[str, float]
    difference: float


# -------------------------------------------------------------------------------------------------------------- ways


def packed(case: Case) -> Function:
    cu_seq, window = torch.tensor(case.ends(), dtype=torch.int32), WINDOWS[case.window]
    longest = int(cu_seq.diff().max())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, cu_seq, cu_seq, longest, longest, window_size=window)  # type: ignore[return-value]

    return torch.compile(attend, backend="fuse", dynamic=False)


def one_by_one(case: Case) -> Function:
    lengths, causal = torch.tensor(case.ends()).diff().tolist(), case.window == "causal"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([_sdpa(*part, is_causal=causal) for part in parts], 1).transpose(0, 1)

    return attend


def masked(case: Case) -> Function:
    document = torch.searchsorted(torch.tensor(case.ends()[1:]), torch.arange(case.tokens), right=True)
    mask = document[:, None] == document
    mask = mask.tril() if case.window == "causal" else mask
    return lambda q, k, v: _sdpa(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """Of (heads, tokens, WIDTH): PyTorch's fast path wants a batch."""
    return scaled_dot_product_attention(q[None], k[None], v[None], **options)[0]  # type: ignore[arg-type]


WAYS: dict[str, Callable[[Case], Function]] = {"fuse": packed, "one by one": one_by_one, "dense mask": masked}


def tensors(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(case.tokens, HEADS, WIDTH).to(getattr(torch, case.dtype)) for _ in range(4)]


def forward(case: Case, way: str) -> Run:
    run, (q, k, v, _) = WAYS[way](case), tensors(case)

    def call() -> Tensor:
        with torch.inference_mode():
            return run(q, k, v)

    return call


def step(case: Case, way: str) -> Run:
    """Forward and backward; the gradients side by side."""
    run, (*inputs, grad) = WAYS[way](case), tensors(case)
    leaves = [x.requires_grad_() for x in inputs]
    return lambda: torch.cat(torch.autograd.grad(run(*leaves), leaves, grad))


def difference(ways: dict[str, Run]) -> float:
    results = [run().float() for run in ways.values()]
    return max((float((x - results[0]).abs().max() / results[0].abs().max()) for x in results[1:]), default=0.0)


def run_case(case: Case, seconds: float) -> Row:
    torch._dynamo.reset()
    found = [working({way: lambda way=way, make=make: make(case, way) for way in WAYS}) for make in (forward, step)]  # type: ignore[misc]
    times = [{way: t.processor for way, t in measure(ways, seconds, enough=seconds).items()} for ways in found]
    return Row(case, times[0], times[1], max(map(difference, found)))


# ------------------------------------------------------------------------------------------------------------ results


def shown(row: Row) -> str:
    cells = ["".join(f"{times.get(way, float('nan')) * 1e3:12.2f}" for way in WAYS) for times in (row.forward, row.training)]
    return (
        f"{row.case.dtype:9}{row.case.window:7}{row.case.tokens:7}{row.case.documents:6}"
        + f"{'  '.join(cells)}   {row.difference:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--documents", type=int, nargs="+", default=[512], help="tokens of one, about")
    parser.add_argument("--windows", nargs="+", default=list(WINDOWS), choices=WINDOWS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for the rounds of one case, forward and training each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine.facts()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    ways = "".join(f"{way:>12}" for way in WAYS)
    print(f"\n{'ms':16}{'tokens':>7}{'each':>6}{ways}  {ways}   difference\n{'':29}{'forward':>12}{'':26}{'training':>12}")
    rows = []
    for case in (
        Case(w, d, n, each) for d in args.dtypes for w in args.windows for n in args.tokens for each in args.documents
    ):
        rows.append(run_case(case, args.seconds))
        print(shown(rows[-1]), flush=True)
    if is_whole(parser, args):
        keep("varlen", facts, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
