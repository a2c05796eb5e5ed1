"""Over several ranks, what cannot be that of the whole sequence is refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from sharded import CASES, HEADS, LENGTH, RANKS, TEXTS, WIDTH, Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fuse


class Before(nn.Module):
    """Attention to what ``way`` has made of its input."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way, self.attention = way, Attention(CASES["causal"])
        self.conv, self.table = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Parameter(torch.randn(512, WIDTH))
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        made: Tensor = self.attention(self.way(self, x, at), (at, at, at >= 0))
        return made


def layer(m: Any, x: Tensor, at: Tensor) -> Any:
    return m.attention(x, (at, at, at >= 0))


def again(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=False)


def of_rows(m: Any, x: Tensor) -> Tensor:
    """Attention whose operands are a product of all texts' rows, as GPT-2's are."""
    rows = torch.addmm(m.dense.bias, x.view(-1, WIDTH), m.dense.weight.mT)
    q = k = v = rows.view(*x.shape[:2], HEADS, -1).transpose(1, 2)
    at = torch.arange(x.shape[1])
    score = (q @ k.mT).masked_fill(at[:, None] < at, -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


runs: list[int] = []


@torch._dynamo.allow_in_graph
def once(x: Tensor) -> Tensor:
    """What Dynamo can follow, and nobody after it."""
    runs.append(1)
    if len(runs) > 1:
        raise RuntimeError("once")
    return x + 1


def counted(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[1])[:, None].cos()


Way = Callable[[Any, Tensor, Tensor], Tensor]
REFUSED: dict[str, Way] = {
    "conv1d reads other positions": lambda m, x, at: m.conv(x.mT).mT,
    "arange counts the positions of this shard from 0": lambda m, x, at: counted(x),
    "table is read at the positions of this shard": lambda m, x, at: x + m.table[: x.shape[1]],
    "cumsum reads other positions": lambda m, x, at: x.cumsum(1),
    "sub reads other positions": lambda m, x, at: x - x.mean(1, keepdim=True),
    "pad reads other positions": lambda m, x, at: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "roll reads other positions": lambda m, x, at: x.roll(1, 1),
    "flip reads other positions": lambda m, x, at: x.flip(1),
    "softmax reads other positions": lambda m, x, at: x * x.softmax(1),
    "matmul reads other positions": lambda m, x, at: x @ x.mT @ x,
    "add reads other positions": lambda m, x, at: x + x[:, :1],
    "sort reads other positions": lambda m, x, at: x.sort(1).values,
    "cumsum reads other positions, in a layer": lambda m, x, at: again(lambda x: layer(m, x.cumsum(1), at), x),
    "arange counts the positions of this shard, before a layer": lambda m, x, at: again(m.norm, counted(x)),
    "tag_activation_checkpoint reads other positions": lambda m, x, at: x + again(lambda x: x.mean(1), x)[:, None],
    "linear reads other positions": lambda m, x, at: F.linear(F.linear(x, x[0]), x[0].mT),
    "the region could not be traced: RuntimeError: once": lambda m, x, at: once(x),
    "cumsum reads other positions, of ones": lambda m, x, at: x * torch.ones(x.shape[:2]).cumsum(1)[..., None],
    "truediv reads other positions, of ones": lambda m, x, at: x / torch.ones_like(x[..., 0]).sum(1)[:, None, None],
    "linear reads other positions, of ones": lambda m, x, at: x * F.linear(x.new_ones(x.shape[1], x.shape[1]), 0.0 * at[:1]),
    "mul reads other positions, the largest": lambda m, x, at: x * at.max(),
    "cumsum reads other positions, where chosen": lambda m, x, at: x.where(x > 0, x.new_ones(x.shape[1]).cumsum(0)[:, None]),
    "mul computes with the length of this shard": lambda m, x, at: x * x.shape[1] ** -0.5,
    "mul computes with the length of this shard, of another tensor": lambda m, x, at: x * at.numel(),
    "masked_fill computes with the length of this shard": lambda m, x, at: x.masked_fill(x > 0, x.shape[1]),
    "clamp computes with the length of this shard": lambda m, x, at: x + m.table[at.clamp(max=x.shape[1] - 1)],
    "getitem computes with the length of this shard": lambda m, x, at: x * torch.arange(x.shape[1])[-1],
    "full computes with the length of this shard": lambda m, x, at: x + torch.full((1,), x.shape[1]),
    "cumsum reads other positions, of all texts": lambda m, x, at: m.dense(x.flatten(0, 1).cumsum(0)).view(x.shape),
}  # fmt: skip
TAKEN: dict[str, Way] = {
    "layers of each position": lambda m, x, at: m.norm(m.dense(F.gelu(m.dense(x)))) + x,
    "rows of all texts": lambda m, x, at: m.dense(x.reshape(-1, WIDTH).relu()).view(x.shape),
    "rotary positions": lambda m, x, at: torch.cat((-x[..., 16:], x[..., :16]), -1) * at[..., None].sin() + x,
    "rotary positions of neighbours": lambda m, x, at: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) + x,
    "rows of a table": lambda m, x, at: x + m.table[at],
    "a choice by position": lambda m, x, at: torch.where(at[..., None] > 5, x, 0),
    "a number of texts": lambda m, x, at: x * x.shape[0],
    "memory of its shape": lambda m, x, at: x + torch.empty_like(x).copy_(x),
    "a softmax over features": lambda m, x, at: x * x.softmax(-1),
    "attention of rows": lambda m, x, at: of_rows(m, x),
    "a layer that is computed twice": lambda m, x, at: again(lambda x: layer(m, m.norm(x), at), x),
}  # fmt: skip


def said(ways: str) -> dict[str, str]:
    """What compiling each of the ``ways`` says; "" where it runs and gives what one process gives."""
    found: dict[str, str] = {}
    for name, way in globals()[ways].items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x, at = Before(way), torch.randn(TEXTS, LENGTH, WIDTH), torch.arange(LENGTH).expand(TEXTS, -1)
        across = fuse.ContextParallel(dist.group.WORLD)
        compiled = torch.compile(model, backend="fuse", options={"inner": "eager", "context_parallel": across})
        try:
            out = compiled(fuse.shard_sequence(x, across), fuse.shard_sequence(at, across))
            torch.testing.assert_close(fuse.gather_sequence(out, across), model(x, at).detach())
            found[name] = ""
        except Exception as e:
            found[name] = str(e)
    return found


def test_what_is_not_computed_for_each_position_by_itself_is_refused_by_name() -> None:
    (found,) = run_ranks(said, 1, "REFUSED")
    for name in REFUSED:
        assert "NotAcrossRanks" in found[name] and name.split(",")[0] in found[name], (name, found[name])
        assert "test_positions.py:" in found[name] or "sharded.py:" in found[name]


def test_what_is_computed_for_each_position_by_itself_is_taken() -> None:
    for rank in run_ranks(said, RANKS, "TAKEN"):
        assert rank == dict.fromkeys(TAKEN, "")


class Unreadable(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        score = x @ (2 * x).mT
        if self.way == "matrix":
            score = score.masked_fill(mask, -torch.inf)
        p = score.softmax(-1)
        if self.way == "no attention":
            p = score.sort(-1).values.softmax(-1)
        if self.way == "dropout":
            p = p * (torch.rand_like(p) > 0.5)
        if self.way == "cross":  # whole on every rank, or a shard of another sequence: nothing says which
            y = x.new_ones(2, 4, 10, 8)
            return (x @ y.mT).softmax(-1) @ (2 * y)
        beside = {"log-sum-exp": score.logsumexp(-1), "weights": p, "weights of all heads": p.mean(1)}.get(self.way)
        return p @ (3 * x) if beside is None else (p @ (3 * x), beside)


UNREADABLE = {
    "matrix": "mask has queries and keys of this shard alone",
    "no attention": "reads other positions than its own",
    "log-sum-exp": "the log-sum-exp of its rows is read, too",
    "weights": "the weights are read, too",
    "weights of all heads": "the mean of the weights over 4 heads are read, too",
    "cross": "queries and 10 keys are not the positions of one sequence",
    "dropout": "random numbers",
}


def refusals() -> dict[str, str]:
    found = {}
    for way in (*UNREADABLE, "fixed"):
        torch._dynamo.reset()
        options = {"inner": "eager", "context_parallel": dist.group.WORLD}
        compiled = torch.compile(Unreadable(way), backend="fuse", options=options)
        tensors = torch.randn(2, 4, LENGTH, 8), torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        for x, dim in ((tensors[0], 2), (tensors[1], 0), (tensors[1], 1)) if way != "fixed" else ():
            torch._dynamo.maybe_mark_dynamic(x, dim)
        try:
            compiled(*tensors)
            found[way] = "ran"
        except Exception as e:
            found[way] = str(e)
    return found


def attend(x: Tensor) -> Tensor:
    return (x @ (2 * x).mT).softmax(-1) @ (3 * x)


def mean_beside(x: Tensor, y: Tensor) -> Tensor:
    return attend(attend(x).mean(1, keepdim=True) + y)


def of_two_sequences() -> str:
    x, y = torch.randn(2, LENGTH, 8), torch.randn(2, 2 * LENGTH, 8)
    for tensor in (x, y):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    compiled = torch.compile(mean_beside, backend="fuse", options={"inner": "eager", "context_parallel": dist.group.WORLD})
    try:
        compiled(x, y)
        return "ran"
    except Exception as e:
        return str(e)


def test_what_one_sequence_reads_of_all_of_another_is_refused() -> None:
    (found,) = run_ranks(of_two_sequences, 1)
    assert "NotAcrossRanks" in found and "add reads other positions than its own" in found, found


def test_attention_that_cannot_be_that_of_the_whole_is_refused_before_anything_runs() -> None:
    (found,) = run_ranks(refusals, 1)
    for way, part in UNREADABLE.items():
        assert "NotAcrossRanks" in found[way] and part in found[way], (way, found[way])
    assert "its length is 48 in the graph" in found["fixed"]
