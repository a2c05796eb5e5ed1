"""Training: a small GPT on characters, eager and compiled with ``backend="fuse"``, from one seed.

    python examples/train_gpt.py                           300 steps of both, a plot of their losses, then the lengths
    python examples/train_gpt.py --steps 40 --lengths 512 1024
    python examples/train_gpt.py --dropout 0.1             each way draws its own masks: the curves agree on average

Attention is written as in any GPT: scores, mask, softmax, dropout, product. Time per step and peak memory are those of one
step (forward, backward, optimizer) beside what the process holds; each way and length runs in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing as mp
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WAYS = ("eager", "inductor", "fuse")
COLOURS = {"eager": "#888888", "fuse": "#d62728"}
CONTEXT, BATCH = 128, 8  # characters seen, texts in a batch, while the losses are compared
TIMED = 3


# -------------------------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in self.qkv(x).split(width, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        weights = F.softmax(scores.masked_fill(~visible, float("-inf")), -1)
        mixed: Tensor = self.out((self.dropout(weights) @ v).transpose(1, 2).reshape(batch, length, width))
        return mixed


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Token ids (batch, length) and the next ones, of the same shape → their mean cross-entropy in nats."""

    def __init__(
        self, vocabulary: int, context: int, dropout: float, width: int = 128, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, following: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), following.flatten())


# --------------------------------------------------------------------------------------------------------------- data


def sums(count: int) -> str:
    """Lines such as "37+85=122", which a model has to look back for."""
    draw = random.Random(0)
    pairs = ((draw.randrange(100), draw.randrange(100)) for _ in range(count))
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)


def encoded(text: str) -> tuple[Tensor, int]:
    """Ids of the characters, and how many different ones there are."""
    alphabet = sorted(set(text))
    return torch.tensor([alphabet.index(c) for c in text]), len(alphabet)


def batch_of(data: Tensor, length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - length - 1, (count,), generator=generator)
    texts = torch.stack([data[s : s + length + 1] for s in starts])
    return texts[:, :-1], texts[:, 1:]


# ------------------------------------------------------------------------------------------------------------ training


def trainer(way: str, length: int, count: int, dropout: float) -> Callable[[], float]:
    """One step of training as a function; its result is the loss before the step. The same numbers for every way."""
    torch.manual_seed(0)
    data, vocabulary = encoded(sums(20_000))
    model = GPT(vocabulary, length, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = model if way == "eager" else torch.compile(model, backend=way)
    generator = torch.Generator().manual_seed(1)

    def step() -> float:
        optimizer.zero_grad()
        loss = run(*batch_of(data, length, count, generator))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def losses(way: str, steps: int, dropout: float) -> list[float]:
    step, found = trainer(way, CONTEXT, BATCH, dropout), []
    for number in range(steps):
        found.append(step())
        if number % 50 == 0 or number == steps - 1:
            print(f"   {way}, step {number}: {found[-1]:.4f}", file=sys.stderr, flush=True)
    return found


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """The losses as an SVG; where they agree, the thin line lies on the thick one."""
    width, height, margin = 720, 400, 50
    top = max(map(max, curves.values()))

    def points(curve: Sequence[float]) -> str:
        x_step = (width - 2 * margin) / max(1, len(curve) - 1)
        return " ".join(
            f"{margin + i * x_step:.1f},{height - margin - y / top * (height - 2 * margin):.1f}" for i, y in enumerate(curve)
        )

    shapes = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for number, (way, curve) in enumerate(curves.items()):
        stroke = f'stroke="{COLOURS[way]}" stroke-width="{6 if number == 0 else 1.5}"'
        shapes.append(f'<polyline points="{points(curve)}" fill="none" {stroke}/>')
        shapes.append(f'<text x="{width - 160}" y="{60 + 20 * number}" fill="{COLOURS[way]}">{way}: {curve[-1]:.4f}</text>')
    shapes.append(
        f'<text x="{width / 2}" y="{height - 12}">step</text><text x="8" y="30">loss in nats, from 0 to {top:.2f}</text>'
    )
    text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14">'
    path.write_text(text + "\n".join(shapes) + "</svg>\n")


# -------------------------------------------------------------------------------------------------- lengths, side by side


def measured(way: str, length: int, dropout: float) -> tuple[float, float]:
    """Milliseconds and megabytes of one step on a single text; the process ends with it."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        return pool.submit(_measure, way, length, dropout).result()


def _measure(way: str, length: int, dropout: float) -> tuple[float, float]:
    step = trainer(way, length, 1, dropout)
    step()  # compiles
    peak = peak_of(step)
    return 1000 * statistics.median(_seconds(step) for _ in range(TIMED)), peak


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_of(call: Callable[[], object]) -> float:
    """Megabytes that ``call`` needs at its peak beyond what the process holds; nan where the system does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept from earlier calls would hide the need for it
    clear.write_text("5")  # resets the high-water mark
    before = _kilobytes(status, "VmRSS")
    call()
    return (_kilobytes(status, "VmHWM") - before) / 1024


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def show(lengths: Sequence[int], ways: Sequence[str], dropout: float) -> None:
    print(f"\n{'length':>8}  {'ms per step: ' + ' / '.join(ways):>40}  {'peak, MB':>28}")
    for length in lengths:
        found = [measured(way, length, dropout) for way in ways]
        times, peaks = (" / ".join(f"{x[i]:.0f}" for x in found) for i in (0, 1))
        print(f"{length:>8}  {times:>40}  {peaks:>28}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="that the lengths are measured with")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the weights of attention")
    parser.add_argument("--plot", type=Path, default=Path("train_gpt.svg"))
    args = parser.parse_args()
    if args.steps:
        curves = {way: losses(way, args.steps, args.dropout) for way in ("eager", "fuse")}
        apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
        plot(curves, args.plot)
        print(f"{args.steps} steps: losses are at most {apart:.2g} apart; curves in {args.plot}")
    if args.lengths:
        show(args.lengths, args.ways, args.dropout)


if __name__ == "__main__":
    main()
