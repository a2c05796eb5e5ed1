"""Attention backward on the CPU: fuse beside torch's SDPA and eager, in one interleaved run.

    python benchmarks/cpu_backward.py [--threads 1] [--only causal] [--dtypes float32 bfloat16] [--peers sdpa]

Inputs, rounds and medians are those of cpu_forward.py; what is timed is ``torch.autograd.grad`` of a result by query, key
and value. Dropout is measured beside the same attention without it: its ratio is what it costs.
The result is kept under benchmarks/results/. Exit status 1 where fuse misses a bar; the bars of bfloat16 are for AMX.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._functorch.config
import torch.nn.functional as F
from cpu_forward import Case, Inputs, attention, begin, report, sdpa
from timing import Run, keep, measure
from torch import Tensor

RATE = 0.1
DROPOUT_COST = 1.3
CASES = (
    Case("full", 2048, 64, {"float32": 1.3, "bfloat16": 3.0}),
    Case("causal", 2048, 64, {"float32": 1.5, "bfloat16": 3.5}),
    Case("full", 197, 64, {"float32": 1.0, "bfloat16": 2.0}),
    Case("dense mask", 2048, 64, {}),
    Case("alibi", 2048, 64, {}),
    Case("soft-cap", 2048, 64, {}),
)
PEERS = ("sdpa", "eager")


def with_dropout(x: Inputs) -> Tensor:
    scores = x.query @ x.key.transpose(-1, -2) * x.query.shape[-1] ** -0.5
    return F.dropout(F.softmax(scores, -1), RATE) @ x.value


def backward(out: Tensor, x: Inputs) -> Run:
    """Computes the gradients of query, key and value, again and again."""
    torch.manual_seed(1)
    grad = torch.randn(out.transpose(1, 2).shape).to(out.dtype).transpose(1, 2)
    inputs = (x.query, x.key, x.value)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)[0]


def compiled(function: Callable[[Inputs], Tensor], x: Inputs) -> Run:
    return backward(torch.compile(function, backend="fuse", dynamic=False)(x), x)


def ways(kind: str, x: Inputs, peers: list[str]) -> dict[str, Run]:
    for tensor in (x.query, x.key, x.value):
        tensor.requires_grad_()
    found = {"fuse": compiled(lambda x: attention(kind, x), x)}
    if "sdpa" in peers and (forward := sdpa(kind, x)) is not None:
        found["sdpa"] = backward(forward(), x)
    if "eager" in peers:
        found["eager"] = backward(attention(kind, x), x)
    return found


def cost_of_dropout(dtype: str, seconds: float) -> dict[str, object]:
    """Time with dropout over time without."""
    case = Case("full", 2048, 64, {})
    x = Inputs.make(case, getattr(torch, dtype))
    for tensor in (x.query, x.key, x.value):
        tensor.requires_grad_()
    runs = {"fuse": compiled(lambda x: attention("full", x), x), "dropout": compiled(with_dropout, x)}
    times = measure(runs, seconds)
    ratio = times["dropout"].processor / times["fuse"].processor
    missed = ratio > DROPOUT_COST
    print(f"{dtype:9} dropout costs {ratio:.2f} of the time without   at most {DROPOUT_COST:.2f}{' missed' if missed else ''}")
    return {"case": "dropout", "dtype": dtype, "ratios": {"cost": ratio}, "bar": DROPOUT_COST, "missed": missed}


def main() -> int:
    args, facts, whole = begin(__doc__, PEERS)
    # A graph whose buffers backward may overwrite cannot be run backward twice.
    torch._functorch.config.donated_buffer = False
    results = []
    for dtype in args.dtypes:
        for case in CASES:
            if args.only in case.name:
                torch._dynamo.reset()
                runs = ways(case.kind, Inputs.make(case, getattr(torch, dtype)), args.peers)
                results.append(report(case, dtype, measure(runs, args.seconds), PEERS))
        if args.only in "dropout":
            torch._dynamo.reset()
            results.append(cost_of_dropout(dtype, args.seconds))
    if whole:
        keep("cpu_backward", facts, results)
    return int(any(r["missed"] for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
