"""Attention forward on the CPU, in one interleaved run: fuse beside torch's SDPA, eager, Inductor and FlexAttention, and
beside OpenVINO and ONNX Runtime where they are installed.

    python benchmarks/cpu_forward.py [--threads 1] [--only causal] [--dtypes float32 bfloat16] [--peers sdpa]

Inputs are [B, S, H, D].transpose(1, 2), as Hugging Face models have them, 12 heads. Each way is compiled on its own, with
``dynamic=False``; rounds take every way once, so that a busy spell of the machine meets all of them; medians of processor
time (all threads) and of wall time. Ratios are time of the other way over time of fuse: above 1 fuse is faster. "share" is
fuse's rate, of the multiply-adds that the mask leaves, over that of a product of two matrices of 1024 x 1024.
The result is kept under benchmarks/results/. Exit status 1 where fuse misses a bar; the bars of bfloat16 are for AMX.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cpu_peers
import machine
import torch
import torch.nn.functional as F
from timing import Repeated, Run, Times, is_whole, keep, measure, working
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fuse.targets.cpp import compiler

HEADS = 12
_SQUARE = 1024
_REPEATED = 5e8  # multiply-adds of a round, some milliseconds
PEERS = ("sdpa", "eager", "inductor", "flex", "openvino", "ort")


@dataclass(frozen=True)
class Case:
    """``bars``: smallest ratio to SDPA that is asked for, by dtype."""

    kind: str
    length: int
    width: int
    bars: dict[str, float]

    @property
    def work(self) -> float:
        """Multiply-adds of both products, where the mask hides nothing or half."""
        return HEADS * self.length**2 * self.width * (1 if self.kind in ("causal", "alibi", "model mask") else 2)

    @property
    def name(self) -> str:
        return f"{self.kind} S={self.length} D={self.width}"


CASES = (
    Case("full", 2048, 64, {"float32": 1.25, "bfloat16": 2.2}),
    Case("causal", 2048, 64, {"float32": 1.2, "bfloat16": 2.4}),
    Case("dense mask", 2048, 64, {"float32": 1.05, "bfloat16": 1.8}),
    Case("alibi", 2048, 64, {"float32": 2.5, "bfloat16": 4.0}),
    Case("model mask", 2048, 64, {"float32": 1.2, "bfloat16": 3.0}),
    Case("soft-cap", 2048, 64, {}),
    *(Case("full", length, 64, {"float32": 1.0, "bfloat16": 1.0}) for length in (197, 512)),
    *(Case("full", 2048, width, {"float32": 1.0, "bfloat16": 1.0}) for width in (32, 80, 96, 128, 256)),
)


@dataclass(frozen=True)
class Inputs:
    """query, key, value of shape (1, HEADS, length, width); bias (1, 1 or HEADS, length, length); slopes (HEADS, 1, 1)."""

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor
    bias: Tensor

    @staticmethod
    def make(case: Case, dtype: torch.dtype) -> Inputs:
        torch.manual_seed(0)
        shape = (1, case.length, HEADS, case.width)
        query, key, value = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3))
        slopes = (2.0 ** -(torch.arange(1, HEADS + 1) * 8 / HEADS)).view(HEADS, 1, 1)
        masked = torch.full((case.length, case.length), -math.inf).triu(1)
        positions = torch.arange(case.length)
        bias = {
            "dense mask": lambda: torch.randn(1, 1, case.length, case.length),
            "alibi": lambda: (slopes * (positions - positions[:, None]) + masked)[None],
            "model mask": lambda: masked[None, None],
        }.get(case.kind, lambda: torch.zeros(0))()
        return Inputs(query, key, value, slopes.to(dtype), bias.to(dtype))


def attention(kind: str, x: Inputs) -> Tensor:
    """As models write it; a causal mask and ALiBi are computed, not loaded."""
    scores = x.query @ x.key.transpose(-1, -2) * x.query.shape[-1] ** -0.5
    positions = torch.arange(scores.shape[-1])
    if kind == "dense mask":
        scores = scores + x.bias
    if kind == "alibi":
        scores = scores + x.slopes * (positions - positions[:, None])
    if kind == "soft-cap":
        scores = torch.tanh(scores / 50) * 50
    if kind in ("causal", "alibi", "model mask"):
        scores = scores.masked_fill(positions > positions[:, None], -math.inf)
    return F.softmax(scores, -1) @ x.value


def sdpa(kind: str, x: Inputs) -> Run | None:
    """SDPA with the mask that it needs to be given; None where it has no way to compute the case."""
    if kind == "soft-cap":
        return None
    mask = x.bias if x.bias.numel() else None
    return lambda: F.scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=mask, is_causal=kind == "causal")


def flex(kind: str, x: Inputs) -> Run:
    length, slopes, bias = x.query.shape[-2], x.slopes.flatten(), x.bias
    causal = kind in ("causal", "alibi", "model mask")
    blocks = create_block_mask(lambda b, h, q, k: (k <= q) | (not causal), None, None, length, length, device="cpu")
    changes: dict[str, Callable[..., Tensor]] = {
        "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
        "soft-cap": lambda s, b, h, q, k: torch.tanh(s / 50) * 50,
        "dense mask": lambda s, b, h, q, k: s + bias[0, 0, q, k],
    }
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.query, x.key, x.value, score_mod=changes.get(kind), block_mask=blocks)


def ways(kind: str, x: Inputs, peers: list[str]) -> dict[str, Run]:
    """Every way to compute the case, compiled and run once."""
    makers: dict[str, Callable[[], Run | None]] = {
        "fuse": lambda: _compiled("fuse", kind, x),
        "sdpa": lambda: sdpa(kind, x),
        "eager": lambda: lambda: attention(kind, x),
        "inductor": lambda: _compiled("inductor", kind, x),
        "flex": lambda: flex(kind, x),
        "openvino": lambda: cpu_peers.openvino(kind, (x.query, x.key, x.value)),
        "ort": lambda: cpu_peers.onnxruntime(kind, (x.query, x.key, x.value)),
        "product": lambda: square(x.query.dtype),
    }
    return working({name: makers[name] for name in ("fuse", *peers, "product")})


def square(dtype: torch.dtype) -> Run:
    a, b = (torch.randn(_SQUARE, _SQUARE).to(dtype) for _ in range(2))
    return lambda: a @ b


def _compiled(backend: str, kind: str, x: Inputs) -> Run:
    """Given tensors, as layers are: what holds them would be guarded, too."""
    given = {name: tensor for name, tensor in vars(x).items() if tensor.numel()}
    missing = {name: tensor for name, tensor in vars(x).items() if name not in given}

    def layer(**tensors: Tensor) -> Tensor:
        return attention(kind, Inputs(**tensors, **missing))

    run = torch.compile(layer, backend=backend, dynamic=False)
    return lambda: run(**given)


def report(case: Case, dtype: str, times: dict[str, Times], count: int = 1, peers: Sequence[str] = PEERS) -> dict[str, object]:
    """``count``: calls in each of the times."""
    ratios = {name: t.processor / times["fuse"].processor for name, t in times.items() if name not in ("fuse", "product")}
    share = (
        times["product"].processor / _SQUARE**3 * case.work * count / times["fuse"].processor
        if "product" in times
        else math.nan
    )
    bar = case.bars.get(dtype)
    applies = dtype != "bfloat16" or compiler.instruction_set() == "amx"
    missed = bool(bar and applies and "sdpa" in ratios and ratios["sdpa"] < bar)
    shown = "".join(f"{ratios[name]:9.2f}" if name in ratios else f"{'-':>9}" for name in peers)
    wanted = f"{bar:.2f}{'' if applies else ' (AMX)'}" if bar else ""
    took = f"{times['fuse'].processor / count * 1e3:9.2f}"
    print(f"{dtype:9} {case.name:26} {took}{shown}{share:8.2f}   {wanted}{' missed' if missed else ''}", flush=True)
    calls = {name: 1 if name == "product" else count for name in times}
    measured = {name: {"processor": t.processor / calls[name], "wall": t.wall / calls[name]} for name, t in times.items()}
    return {
        "case": case.name,
        "dtype": dtype,
        "seconds": measured,
        "ratios": ratios,
        "share": share,
        "bar": bar,
        "missed": missed,
    }


def begin(description: str | None, peers: Sequence[str]) -> tuple[argparse.Namespace, dict[str, object], bool]:
    """The arguments, what is measured on, and whether the run is one to keep; prints the table's head."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--peers", nargs="*", default=list(peers), choices=peers)
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds of one case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine.facts()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    names = "".join(f"{name:>9}" for name in peers)
    print(f"\n{'':36} {'fuse ms':>9}{names}   share   bar (SDPA)   [time of each / time of fuse]")
    return args, facts, is_whole(parser, args)


def main() -> int:
    args, facts, whole = begin(__doc__, PEERS)
    results = []
    for dtype in args.dtypes:
        for case in CASES:
            if args.only in case.name:
                torch._dynamo.reset()
                with torch.inference_mode():
                    runs = ways(case.kind, Inputs.make(case, getattr(torch, dtype)), args.peers)
                    count = max(1, int(_REPEATED / case.work))
                    many = {name: run if name == "product" else Repeated(run, count) for name, run in runs.items()}
                    results.append(report(case, dtype, measure(many, args.seconds), count))
    if whole:
        keep("cpu_forward", facts, results)
    return int(any(r["missed"] for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
