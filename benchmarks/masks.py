"""What the structure of a mask is worth: fuse beside FlexAttention, SDPA with the dense mask and eager, in one interleaved run.

    python benchmarks/masks.py [--threads 1] [--lengths 1024 4096] [--masks causal window] [--dtypes float32] [--peers flex]

fuse and eager get what models write: two products, a softmax, and a mask that the graph builds. FlexAttention is compiled
(``dynamic=False``), as is the making of its BlockMask, whose time stands beside. SDPA gets its mask as a bool tensor, made
beforehand, and ``is_causal`` where the mask is causal. Milliseconds of processor time per head, medians; a peer that needs
long is called less often than fuse, and left out where it would need more than EAGER_GB. Every result of fuse is compared
with float64 on some rows. Exit status 1 where a bar is missed; a full run of everything is kept under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import machine
import torch
import torch.nn.functional as F
from timing import Run, Times, is_whole, keep, measure, working
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

WIDTH = 64
LENGTHS = (1024, 4096, 8192, 16384)
PEERS = ("flex", "sdpa", "eager")
EAGER_GB = 3.0  # for scores and probabilities
ERRORS = {"float32": 2e-6, "bfloat16": 2e-2}  # of the root mean square of the result


@dataclass(frozen=True)
class Inputs:
    """query, key, value (1, heads, length, WIDTH); kept and documents (1, length); mask (1, 1, length, length)."""

    query: Tensor
    key: Tensor
    value: Tensor
    kept: Tensor
    documents: Tensor
    mask: Tensor

    @staticmethod
    def make(length: int, heads: int, dtype: str) -> Inputs:
        """Padded on the left by half; a document every 1024 positions, of lengths that differ by up to a half."""
        torch.manual_seed(0)
        shape = (1, length, heads, WIDTH)
        query, key, value = (torch.randn(shape).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(3))
        positions = torch.arange(length)
        share = torch.rand(max(2, length // 1024)) + 1
        ends = (share.cumsum(0) / share.sum() * length).long()[:-1]
        documents = torch.searchsorted(ends, positions, right=True)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        return Inputs(query, key, value, (positions >= length // 2)[None], documents[None], mask[None, None])

    @property
    def length(self) -> int:
        return self.query.shape[-2]


Indices = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mask:
    """``visible``: as a model builds it, from the positions of query (length, 1) and key; None where all is visible.
    ``flex``: the same for one entry; None where it says what ``visible`` says."""

    visible: Callable[[Inputs, Tensor, Tensor], Tensor] | None
    flex: Callable[[Inputs], Indices] | None = None
    opaque: bool = False

    def entries(self, x: Inputs) -> Indices:
        visible = self.visible
        assert visible is not None
        return self.flex(x) if self.flex else lambda q, k: visible(x, q, k)


MASKS = {
    "full": Mask(None),
    "causal": Mask(lambda x, q, k: k <= q),
    "causal tensor": Mask(lambda x, q, k: x.mask, flex=lambda x: lambda q, k: x.mask[0, 0, q, k], opaque=True),
    "window 256": Mask(lambda x, q, k: (k <= q) & (q - k < 256)),
    "documents": Mask(
        lambda x, q, k: x.documents[:, None, :, None] == x.documents[:, None, None, :],
        flex=lambda x: lambda q, k: x.documents[0, q] == x.documents[0, k],
    ),
    "left padding": Mask(lambda x, q, k: x.kept[:, None, None, :], flex=lambda x: lambda q, k: x.kept[0, k]),
    "prefix": Mask(lambda x, q, k: (k <= q) | (k < x.length // 4)),
    "dilated": Mask(lambda x, q, k: (k <= q) & (q - k < 1024) & ((q - k) % 4 == 0)),
    "block diagonal": Mask(lambda x, q, k: q // 512 == k // 512),
}


@dataclass(frozen=True)
class Case:
    mask: str
    length: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.mask} at {self.length}"

    @property
    def heads(self) -> int:
        """Fewer of them in longer texts: 2 at 16k. What is computed once for all heads weighs the more."""
        return max(1, min(8, 32768 // self.length))


@dataclass(frozen=True)
class Row:
    """``seconds``: processor time per head. ``flex_mask``: seconds to make a BlockMask, which serves all heads."""

    case: Case
    seconds: dict[str, float]
    flex_mask: float
    error: float


@dataclass(frozen=True)
class Bar:
    """What was asked for, and what came out."""

    text: str
    value: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def missed(self) -> bool:
        return not self.least <= self.value <= self.most


# -------------------------------------------------------------------------------------------------------------- ways


def attention(mask: Mask, x: Inputs) -> Tensor:
    scores = x.query @ x.key.transpose(-1, -2) * WIDTH**-0.5
    if mask.visible is not None:
        positions = torch.arange(x.length)
        scores = scores.masked_fill(~mask.visible(x, positions[:, None], positions), -math.inf)
    return F.softmax(scores, -1) @ x.value


def compiled(mask: Mask, x: Inputs) -> Run:
    run = torch.compile(lambda x: attention(mask, x), backend="fuse", dynamic=False)
    return lambda: run(x)


def sdpa(name: str, x: Inputs) -> Run:
    mask, causal = MASKS[name], name == "causal"
    positions = torch.arange(x.length)
    dense = None if mask.visible is None or causal else mask.visible(x, positions[:, None], positions)
    return lambda: F.scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=dense, is_causal=causal)


def flex(mask: Mask, x: Inputs) -> tuple[Run, float]:
    """With the seconds of processor time that its BlockMask takes once it is compiled."""
    blocks, seconds = None, 0.0
    if mask.visible is not None:
        entries, make = mask.entries(x), torch.compile(create_block_mask, dynamic=False)
        for _ in range(2):  # the first call compiles
            start = time.process_time()
            blocks = make(lambda b, h, q, k: entries(q, k), None, None, x.length, x.length, device="cpu")
            seconds = time.process_time() - start
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(x.query, x.key, x.value, block_mask=blocks), seconds


def error(mask: Mask, x: Inputs, out: Tensor) -> float:
    """Root mean square of the difference from float64, relative, over 16 rows that begin, end and lie between tiles."""
    rows = torch.linspace(0, x.length - 1, 16).long()
    scores = x.query[:, :, rows].double() @ x.key.transpose(-1, -2).double() * WIDTH**-0.5
    if mask.visible is not None:
        entries = mask.entries(x)(rows[:, None], torch.arange(x.length))
        scores = scores.masked_fill(~entries, -math.inf)
    exact = F.softmax(scores, -1) @ x.value.double()
    seen = ~exact.isnan()
    difference = (out[:, :, rows].double() - exact)[seen]
    return float((difference.square().mean() / exact[seen].square().mean()).sqrt())


def run_case(case: Case, peers: list[str], seconds: float) -> Row:
    torch._dynamo.reset()
    mask, x = MASKS[case.mask], Inputs.make(case.length, case.heads, case.dtype)
    block_mask = [math.nan]

    def with_flex() -> Run:
        run, block_mask[0] = flex(mask, x)
        return run

    bytes_each = 4 if case.dtype == "float32" else 2
    fits = 2 * bytes_each * case.heads * case.length**2 < EAGER_GB * 2**30
    makers: dict[str, Callable[[], Run | None]] = {
        "flex": with_flex,
        "sdpa": lambda: sdpa(case.mask, x),
        "eager": lambda: (lambda: attention(mask, x)) if fits else None,
    }
    ways = working({"fuse": lambda: compiled(mask, x)} | {name: makers[name] for name in peers})
    times: dict[str, Times] = measure(ways, seconds, enough=seconds)
    each = {name: t.processor / case.heads for name, t in times.items()}
    return Row(case, each, block_mask[0], error(mask, x, ways["fuse"]()))


# ------------------------------------------------------------------------------------------------------------ results


def shown(row: Row, peers: list[str]) -> str:
    """Milliseconds per head, then how many times fuse's the peers take."""
    ours = row.seconds["fuse"]
    with_mask = row.seconds.get("flex", math.nan) + row.flex_mask / row.case.heads
    numbers = {name: row.seconds.get(name, math.nan) for name in peers} | ({"+ mask": with_mask} if "flex" in peers else {})
    cells = "".join(f"{'-':>18}" if math.isnan(t) else f"{t * 1e3:10.1f} {t / ours:6.1f}x" for t in numbers.values())
    return (
        f"{row.case.dtype:9}{row.case.mask:15}{row.case.length:6}{row.case.heads:6}{ours * 1e3:10.2f}{cells}   {row.error:.1e}"
    )


def bars(rows: list[Row]) -> list[Bar]:
    """Those that can be told from the rows there are."""
    found = []
    time_of = {(r.case.dtype, r.case.mask, r.case.length): r.seconds["fuse"] for r in rows}

    def compare(text: str, dtype: str, over: tuple[str, int], under: tuple[str, int], **limits: float) -> None:
        if (dtype, *over) in time_of and (dtype, *under) in time_of:
            ratio = time_of[dtype, *over] / time_of[dtype, *under]
            found.append(Bar(f"{dtype} {text}", ratio, **limits))

    for dtype in dict.fromkeys(r.case.dtype for r in rows):
        compare("window 256 at 16k / at 4k, linear: 4", dtype, ("window 256", 16384), ("window 256", 4096), most=4.8)
        compare("causal / window 256 at 16k", dtype, ("causal", 16384), ("window 256", 16384), least=8)
        compare("full / documents at 8k", dtype, ("full", 8192), ("documents", 8192), least=5)
        for length in (n for n in LENGTHS if n >= 4096):
            compare(f"full / left padding at {length}", dtype, ("full", length), ("left padding", length), least=1.6)
            compare(f"full / causal at {length}", dtype, ("full", length), ("causal", length), least=1.7)
            compare(f"causal tensor / causal at {length}", dtype, ("causal tensor", length), ("causal", length), most=1.25)
        mine = [r for r in rows if r.case.dtype == dtype]
        worst = max(mine, key=lambda r: r.error)
        found.append(Bar(f"{dtype} largest error ({worst.case.name})", worst.error, most=ERRORS[dtype]))
        if raced := [r for r in mine if "flex" in r.seconds]:
            least = min(raced, key=lambda r: r.seconds["flex"] / r.seconds["fuse"])
            ratio = least.seconds["flex"] / least.seconds["fuse"]
            found.append(Bar(f"{dtype} least FlexAttention / fuse ({least.case.name})", ratio, least=2))
    return found


def memory_of(name: str, length: int) -> float:
    """MB that one call of fuse holds beside inputs and output, one head of float32."""
    x, mask = Inputs.make(length, 1, "float32"), MASKS[name]
    run = compiled(mask, x)
    run()
    return machine.extra_peak(run)


def memory_bars(names: list[str]) -> list[Bar]:
    """From 8k to 16k, linear growth doubles what is more than noise."""
    found = []
    for name in names:
        if not MASKS[name].opaque:
            short, long = (machine.in_process("--memory-of", name, n) for n in (8192, 16384))
            found.append(Bar(f"{name}: MB at 16k, {short:.1f} at 8k", long, most=2.2 * max(short, 0) + 4))
    return found


def tell(found: list[Bar]) -> None:
    for bar in found:
        limit = f">= {bar.least:g}" if bar.least > -math.inf else f"<= {bar.most:.3g}"
        print(f"  {bar.text:55} {bar.value:9.3g}   {limit}{'   missed' if bar.missed else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(ERRORS))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of one case")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurement of memory")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        if args.memory_of:
            print(memory_of(args.memory_of[0], int(args.memory_of[1])))
            return 0
        facts = machine.facts()
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))
        columns = args.peers + ["+ mask"] * ("flex" in args.peers)
        print(f"\n{'ms per head':24}{'S':>6}{'heads':>6}{'fuse':>10}" + "".join(f"{c:>10}{'':8}" for c in columns) + "   error")
        rows = []
        for case in (Case(m, n, d) for d in args.dtypes for m in args.masks for n in args.lengths):
            rows.append(run_case(case, args.peers, args.seconds))
            print(shown(rows[-1], args.peers), flush=True)
    found = bars(rows) + ([] if args.no_memory else memory_bars(args.masks))
    print()
    tell(found)
    if is_whole(parser, args):
        keep("masks", facts, [asdict(row) for row in rows] + [asdict(bar) for bar in found])
    return int(any(bar.missed for bar in found))


if __name__ == "__main__":
    raise SystemExit(main())
