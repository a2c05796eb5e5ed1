"""Memory that one attention takes beside its inputs and its output, S=16384, one head, for masks a model builds in its graph.

    python benchmarks/cpu_memory.py [--length 16384] [--ways fuse sdpa] [--dtype float32]

Peak of the resident set during the second call, less the resident set before it and the output. Each case runs in a process
of its own (Linux only: the peak is read from, and reset in, /proc). Exit status 1 where fuse takes 64 MB or more.
"""

from __future__ import annotations

import argparse
import math

import forms
import machine
import torch
import torch.nn.functional as F
from torch import Tensor

BAR_MB = 64
WIDTH = 64
WAYS = ("fuse", "sdpa", "inductor", "eager")


def visible(kind: str, length: int, kept: Tensor, documents: Tensor) -> Tensor | None:
    """The mask as models build it: bool, (1, 1, length, length) or what broadcasts to it."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    if kind == "causal":
        return k <= q
    if kind == "window":
        return (k <= q) & (q - k < 1024)
    if kind == "padding":
        return kept[:, None, None, :]
    if kind == "causal and padding":
        return (k <= q) & kept[:, None, None, :]
    if kind == "documents":
        return (documents[:, None, :, None] == documents[:, None, None, :]) & (k <= q)
    return None


NO_SOFTMAX = ("sigmoid", "retention", "linear")  # of forms.py
KINDS = ("full", "causal", "window", "padding", "causal and padding", "documents", "alibi", "t5", "soft-cap", *NO_SOFTMAX)


def t5_bias(length: int) -> Tensor:
    """A number for each of 32 buckets of the distance, as in T5: Raffel et al. 2020, section 2.1. (length, length)."""
    distance = torch.arange(length) - torch.arange(length)[:, None]
    size = distance.abs()
    far = 8 + (torch.log(size.float() / 8) / math.log(128 / 8) * 8).long()
    bucket = torch.where(size < 8, size, far.clamp(max=15)) + (distance > 0) * 16
    return torch.linspace(-1, 1, 32)[bucket]


def attention(kind: str, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, documents: Tensor) -> Tensor:
    if kind in NO_SOFTMAX:
        return forms.FORMS[kind](query, key, value)[0]
    length = query.shape[-2]
    scores = query @ key.transpose(-1, -2) * WIDTH**-0.5
    if kind == "alibi":
        scores = scores + (0.25 * (torch.arange(length) - torch.arange(length)[:, None])).to(scores.dtype)
    if kind == "t5":
        scores = scores + t5_bias(length).to(scores.dtype)
    if kind == "soft-cap":
        scores = torch.tanh(scores / 50) * 50
    mask = visible("causal" if kind == "alibi" else kind, length, kept, documents)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.softmax(scores, -1) @ value


def with_sdpa(kind: str, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, documents: Tensor) -> Tensor:
    mask = visible(kind, query.shape[-2], kept, documents)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def measure(way: str, kind: str, length: int, dtype: str) -> float:
    """MB beyond inputs and output; NaN where the way has no such case."""
    if way == "sdpa" and kind in ("alibi", "t5", "soft-cap", *NO_SOFTMAX):
        return math.nan
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, length, 1, WIDTH).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(3))
    kept = (torch.arange(length) < length * 3 // 4)[None]
    documents = torch.arange(length)[None] // 3000
    run = with_sdpa if way == "sdpa" else attention
    if way in ("fuse", "inductor"):
        run = torch.compile(run, backend=way, dynamic=False)
    with torch.inference_mode():
        run(kind, query, key, value, kept, documents)
        return machine.extra_peak(lambda: run(kind, query, key, value, kept, documents))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--ways", nargs="+", default=["fuse", "sdpa"], choices=WAYS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measure(*args.one, args.length, args.dtype))
        return 0
    print(f"MB beyond inputs and output, S={args.length}, one head of {WIDTH}, {args.dtype}, torch {torch.__version__}")
    print(f"{'':20}" + "".join(f"{way:>12}" for way in args.ways))
    missed = False
    for kind in args.kinds:
        found = [machine.in_process("--one", way, kind, "--length", args.length, "--dtype", args.dtype) for way in args.ways]
        missed |= any(way == "fuse" and not mb < BAR_MB for way, mb in zip(args.ways, found, strict=True))
        print(f"{kind:20}" + "".join(f"{mb:12.1f}" for mb in found), flush=True)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
