"""Small calls of SDPA and decoding on the CPU: is there a call that should not be fused?

    python benchmarks/cpu_small.py [--threads 1] [--seconds 0.3] [--dtypes float32 bfloat16]

Each call is F.scaled_dot_product_attention in a graph of its own, compiled with fuse and with Inductor alone, which calls
torch's SDPA; rounds take both in turn, each as often as takes a few milliseconds. Ratios are Inductor's processor time over
fuse's: above 1 fuse is faster.
"""

from __future__ import annotations

import argparse
from functools import partial

import machine
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

# (batch, heads, queries, keys): tiny graphs, windows, an image, decoding with short and long caches
SHAPES = (
    (1, 1, 8, 8), (1, 4, 16, 16), (2, 8, 32, 32), (8, 12, 49, 49), (2, 8, 64, 64), (1, 12, 197, 197),
    (1, 32, 1, 64), (1, 32, 1, 512), (1, 32, 1, 2048), (1, 8, 4, 1024),
)  # fmt: skip
WIDTHS = (16, 64, 128)
_REPEATED = 3e6  # multiply-adds and their like, some milliseconds


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def ratio(shape: tuple[int, int, int, int], width: int, dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    """Inductor's time over fuse's, and fuse's in microseconds."""
    batch, heads, queries, keys = shape
    torch._dynamo.reset()
    query = torch.randn(batch, queries, heads, width).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, keys, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
    count = max(1, int(_REPEATED / (batch * heads * queries * keys * width + 1e5)))
    ways = {name: torch.compile(attend, backend=name, dynamic=False) for name in ("fuse", "inductor")}
    runs = {name: timing.Repeated(partial(way, query, key, value), count) for name, way in ways.items()}
    for run in runs.values():
        run()
    times = timing.measure(runs, seconds)
    return times["inductor"].processor / times["fuse"].processor, times["fuse"].processor / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each call")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    facts, results = machine.facts(), []
    print(facts)
    for name in args.dtypes:
        for width in WIDTHS:
            for shape in SHAPES:
                with torch.no_grad():
                    faster, microseconds = ratio(shape, width, getattr(torch, name), args.seconds)
                results.append({"dtype": name, "width": width, "shape": shape, "ratio": faster, "us": microseconds})
                print(f"{name:9} D={width:<4} {shape!s:18} {faster:6.2f} {microseconds:9.0f} us", flush=True)
    if timing.is_whole(parser, args):
        timing.keep("cpu_small", facts, results)


if __name__ == "__main__":
    main()
