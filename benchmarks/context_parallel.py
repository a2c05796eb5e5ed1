"""Memory and bytes of a sequence on several ranks: measured where that fits one machine, computed for more ranks and positions.

    python benchmarks/context_parallel.py [--ranks 4] [--lengths 8192 16384 32768]

One layer's attention, forward and backward, in float32: 8 heads of 64 features, keys and values of 2 heads, one text; ranks are
processes that gloo connects. For each mask and way: bytes that a rank sends, the most of all ranks, and what it holds at its
peak beside its operands, its result and their gradients. Both are computed by the same formulas for what is measured and for
what is not; memory without what kernels and the allocator hold. Exit status 1 where bytes differ at all, where memory grows
faster than the length by more than a fifth, or where a window of 1024 sends more than a third of what a causal mask does.

torch's own context parallelism is run beside it where it runs on this machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import machine
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timing import is_whole, keep
from torch import Tensor

import fuse
from fuse.ir.spec import AttentionSpec
from fuse.parallel.exchange import traffic
from fuse.parallel.layout import Extent, Layout, joined, pieces
from fuse.parallel.needs import needs

HEADS, GROUPS, WIDTH, WINDOW, FLOAT = 8, 2, 64, 1024, 4
ROW = 2 * GROUPS * WIDTH * FLOAT  # of one position's keys and values, in bytes
LARGE = ((131072, 64), (131072, 512), (2**20, 64), (2**20, 512))
MB = 2**20


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def window(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (q - k < WINDOW)


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"causal": causal, "window": window}
LAYOUTS = [(balanced, way) for balanced in (False, True) for way in ("gather", "ring")]


@dataclass(frozen=True)
class Setting:
    mask: str
    length: int
    ranks: int
    balanced: bool
    way: str

    @property
    def layout(self) -> Layout:
        return Layout(self.ranks, self.balanced)


@dataclass(frozen=True)
class Row:
    """Of the rank that has most: MB sent in both passes, and MB held beside what stays; as measured, None where nothing was."""

    setting: Setting
    sent: float
    held: float
    measured_sent: float | None = None
    measured_held: float | None = None


def attention(mask: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
        at = torch.arange(query.shape[2])
        score = (query @ key.mT * WIDTH**-0.5).masked_fill(~MASKS[mask](at[:, None], at), -torch.inf)
        return score.softmax(-1) @ value

    return attend


# ----------------------------------------------------------------------------------------------------------- formulas


def computed(setting: Setting, spec: AttentionSpec) -> Row:
    """Sent: forward and backward take the keys that are seen, and backward gives as many gradients back.

    Held, in backward, which holds more, without what kernels hold. By gathering: the keys that are seen, their gradients as a
    kernel gives them and as they add up; or, in the place of the former, those that are sent and that arrive. By a ring: the
    keys of one rank and of the next, as they are sent, too, and as many gradients of the former, also as a kernel gives them,
    as they are sent and as others arrive. Beside that three times what the shard's queries take: gradients as a kernel gives
    them and as they add up, and the result's; and the gradients of the shard's own keys.
    """
    shard = setting.length // setting.ranks
    seen = [joined(extents) for extents in needs(spec, (1, HEADS, shard, shard, 0, 0, shard), setting.layout)]
    most_sent, most_held = 0, 0
    for rank in range(setting.ranks):
        given = [rows(setting, rank, user, seen) for user in range(setting.ranks) if user != rank]
        taken = [rows(setting, owner, rank, seen) for owner in range(setting.ranks) if owner != rank]
        most_sent = max(most_sent, 2 * sum(given) + sum(taken))
        own = rows(setting, rank, rank, seen)
        if setting.way == "gather":
            held = 2 * (sum(taken) + own) + max(sum(taken) + own, sum(taken) + sum(given))
        else:
            held = 4 * max([*taken, own]) + 2 * max(given) + 2 * max(taken)
        most_held = max(most_held, held)
    own_bytes = shard * (3 * HEADS * WIDTH * FLOAT + ROW)
    return Row(setting, most_sent * ROW / MB, (most_held * ROW + own_bytes) / MB)


def rows(setting: Setting, owner: int, user: int, seen: list[tuple[Extent, ...]]) -> int:
    """How many keys of rank ``owner`` the queries of rank ``user`` see."""
    return sum(p.stop - p.start for p in pieces(setting.layout.segments(owner, setting.length), seen[user]))


# -------------------------------------------------------------------------------------------------------- measurement


def measured(rank: int, folder: str, setting: Setting) -> None:
    """On one rank; writes bytes sent and held, and the spec."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.ranks)
    across = fuse.ContextParallel(dist.group.WORLD, setting.balanced, setting.way)
    compiled = torch.compile(attention(setting.mask), backend="fuse", options={"inner": "eager", "context_parallel": across})
    operands = [torch.randn(1, n, setting.length // setting.ranks, WIDTH) for n in (HEADS, GROUPS, GROUPS)]
    for x in operands:
        torch._dynamo.maybe_mark_dynamic(x.requires_grad_(), 2)

    def step() -> Tensor:
        out = compiled(*operands)
        out.sum().backward()
        return out.detach()

    step()  # compiles, and makes the gradients
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be taken again, unseen
    traffic.reset()
    held = machine.extra_peak(step)
    torch.save((traffic.sent / MB, held, fuse.report().sites[0].spec), f"{folder}/{rank}")
    dist.destroy_process_group()


def measure(setting: Setting) -> tuple[Row, AttentionSpec]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measured, (folder, setting), setting.ranks)
        found = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(setting.ranks)]
    spec: AttentionSpec = found[0][2]
    row = computed(setting, spec)
    return Row(setting, row.sent, row.held, max(x[0] for x in found), max(x[1] for x in found)), spec


def torchs_own(rank: int, folder: str, ranks: int) -> None:
    """Whether torch's ring attention runs here: of a causal SDPA."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    q, k, v = (torch.randn(1, HEADS, 1024, WIDTH) for _ in range(3))
    with context_parallel(init_device_mesh("cpu", (ranks,)), buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
    dist.destroy_process_group()


def printed(row: Row) -> None:
    s = row.setting
    layout = "balanced" if s.balanced else "in order"
    found = "" if row.measured_sent is None else f"   measured: {row.measured_sent:9.2f} sent {row.measured_held:8.1f} held"
    print(
        f"{s.mask:8}{s.length:9}{s.ranks:5}  {layout:10}{s.way:8}{row.sent:10.2f} sent {row.held:9.1f} held{found}", flush=True
    )


def misses(rows: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if row.measured_sent is not None and abs(row.measured_sent - row.sent) > 1e-6:
            found.append(f"{row.setting}: sends {row.measured_sent:.2f} MB, computed {row.sent:.2f}")
    for row, longer in zip(rows, rows[1:], strict=False):
        allowed = 1.2 * (row.measured_held or 0) * longer.setting.length / row.setting.length
        if row.setting.length < longer.setting.length and (longer.measured_held or 0) > allowed > 0:
            found.append(f"{longer.setting}: holds {longer.measured_held:.1f} MB, more than {allowed:.1f}")
    sent = {(r.setting.mask, r.setting.length, r.setting.ranks): r.sent for r in rows if not r.setting.balanced}
    narrow = [(n, ranks) for mask, n, ranks in sent if mask == "window" and n // ranks >= 4 * WINDOW]
    return found + [f"a window sends too much at {at}" for at in narrow if 3 * sent["window", *at] > sent["causal", *at]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine.facts()
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), "\nMB of the rank that has most\n")
    found: list[Row] = []
    for mask in MASKS:
        for balanced, way in LAYOUTS:
            for length in args.lengths:
                row, spec = measure(Setting(mask, length, args.ranks, balanced, way))
                printed(row)
                found.append(row)
            for length, ranks in LARGE:
                found.append(computed(Setting(mask, length, ranks, balanced, way), spec))
                printed(found[-1])
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(torchs_own, (folder, args.ranks), args.ranks)
            print("\ntorch's context parallelism of a causal SDPA runs here")
        except Exception as error:
            print(f"\ntorch's context parallelism of a causal SDPA does not run here: {str(error).strip().splitlines()[-1]}")
    if is_whole(parser, args):
        keep("context_parallel", facts, [asdict(row) for row in found])
    if missed := misses(found):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
