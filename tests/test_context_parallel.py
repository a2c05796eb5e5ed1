"""A sequence on two ranks: results and gradients are those of the whole, what travels is what the mask lets be seen, and what
cannot be done is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fuse
from fuse.errors import InvalidOption, NoRanks, NotAShard
from fuse.parallel.exchange import traffic

RANKS, TEXTS, LENGTH, WIDTH, HEADS, GROUPS = 2, 2, 48, 32, 4, 2
Places = tuple[Tensor, Tensor, Tensor]  # position ids, documents, which are no padding
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of query and key positions, documents and kept ones


def causal(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return (k <= q)[None, None]


def window(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return ((k <= q) & (q - k < 7))[None, None]


def both_sides(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return ((q - k).abs() < 9)[None, None]


def of_documents(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return causal(q, k, documents, kept) & (documents[:, None, :, None] == documents[:, None, None])


def padded(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return causal(q, k, documents, kept) & kept[:, None, None]


def everything(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return torch.ones_like(k <= q)[None, None]


@dataclass(frozen=True)
class Case:
    """``fill``: of what is hidden; ``bias``: that a position of distance takes off; ``sink``: a logit without a value."""

    mask: Mask
    fill: float = -torch.inf
    bias: float = 0.0
    sink: bool = False
    dtype: torch.dtype = torch.float32


LOWEST = torch.finfo(torch.float32).min
CASES = {
    "causal": Case(causal, bias=0.1),
    "window": Case(window, LOWEST),
    "both sides": Case(both_sides),
    "documents": Case(of_documents),
    "padding, hidden by the lowest number": Case(padded, LOWEST),
    "everything": Case(everything),
    "sink": Case(window, sink=True),
    "bfloat16": Case(window, dtype=torch.bfloat16),
}
LAYOUTS = [(balanced, way) for balanced in (False, True) for way in ("gather", "ring")] + [(True, "auto")]


class Attention(nn.Module):
    """With grouped queries, and keys and values that one layer gives."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.memory = nn.Linear(WIDTH, 2 * GROUPS * (WIDTH // HEADS))
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        _, documents, kept = places
        q = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.memory(x).unflatten(-1, (2, GROUPS, -1)).permute(2, 0, 3, 1, 4).repeat_interleave(HEADS // GROUPS, 2)
        at = torch.arange(x.shape[1])
        score = q @ k.mT * (WIDTH // HEADS) ** -0.5 - self.case.bias * (at[:, None] - at).to(x.dtype)
        score = score.masked_fill(~self.case.mask(at[:, None], at, documents, kept), self.case.fill)
        if self.case.sink:
            score = torch.cat((score, self.sink[None, :, None, None].expand(*score.shape[:3], 1)), -1)
        weights = score.softmax(-1)[..., : k.shape[2]]
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + mixed


class Layers(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first, self.second = Attention(case), Attention(case)
        self.norm, self.places = nn.LayerNorm(WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.ahead = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        x = self.first(x + self.places(places[0]), places)
        result: Tensor = self.second(x + self.ahead(self.norm(x)), places)
        return result


def batch() -> tuple[Tensor, Places]:
    positions = torch.arange(LENGTH)
    kept = torch.ones(TEXTS, LENGTH, dtype=torch.bool)
    kept[1, :5] = False
    return torch.randn(TEXTS, LENGTH, WIDTH), (
        positions.expand(TEXTS, -1),
        torch.stack((positions // 11, positions // 29)),
        kept,
    )


@dataclass(frozen=True)
class Difference:
    """Of ranks from one process: the largest of the result, and of gradients as a share of their largest; bytes sent."""

    fused: tuple[int, int]
    result: float
    gradients: float
    sent: int


def difference(case: Case, across: fuse.ContextParallel, inner: str) -> Difference:
    torch.manual_seed(0)
    model = Layers(case).to(case.dtype)
    x, places = batch()
    x = x.to(case.dtype)
    weights = torch.randn_like(x)
    whole = x.clone().requires_grad_()
    expected = model(whole, places)
    (expected * weights).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    compiled = torch.compile(model, backend="fuse", options={"inner": inner, "context_parallel": across})
    shard, own = fuse.shard_sequence(x, across).requires_grad_(), tuple(fuse.shard_sequence(t, across) for t in places)
    torch._dynamo.maybe_mark_dynamic(shard, 1)
    traffic.reset()
    out = compiled(shard, own)
    sent = traffic.sent
    (out * fuse.shard_sequence(weights, across)).sum().backward()
    of_input = relative(fuse.gather_sequence(shard.grad, across), whole.grad)
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    shares = [relative(p.grad, wanted[n]) for n, p in model.named_parameters() if wanted[n] is not None]
    report = fuse.report()
    found = float((fuse.gather_sequence(out, across) - expected.detach()).abs().max())
    return Difference((len(report.sites), report.fused), found, max(of_input, *shares), sent)


def relative(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None and b is not None
    return float((a - b).abs().max() / b.abs().max())


def differences(names: tuple[str, ...], inner: str) -> dict[tuple[str, bool, str], Difference]:
    found = {}
    for name in names:
        for balanced, way in LAYOUTS:
            torch._dynamo.reset()
            fuse.reset()
            across = fuse.ContextParallel(dist.group.WORLD, balanced=balanced, way=way)
            found[name, balanced, way] = difference(CASES[name], across, inner)
    return found


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[tuple[str, bool, str], Difference]]:
    return run_ranks(differences, RANKS, tuple(CASES), "eager", limit=600)


@pytest.mark.parametrize(("balanced", "way"), LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_attention_of_shards_is_that_of_the_whole(name: str, balanced: bool, way: str, of_ranks: list) -> None:
    allowed = 2e-6 if CASES[name].dtype == torch.float32 else 4e-2
    for rank in of_ranks:
        found = rank[name, balanced, way]
        assert found.fused == (2, 2)
        assert max(found.result, found.gradients) < allowed, found


def test_only_what_the_mask_lets_be_seen_travels(of_ranks: list) -> None:
    """Keys and values of both layers, of 16 features in two groups each, in float32."""
    key = TEXTS * 2 * GROUPS * (WIDTH // HEADS) * 4 * 2
    first, second = ({name: rank[name, False, "gather"].sent for name in CASES} for rank in of_ranks)
    assert (first["causal"], second["causal"]) == (24 * key, 0)
    assert (first["window"], second["window"]) == (6 * key, 0)
    assert (first["both sides"], second["both sides"]) == (8 * key, 8 * key)
    assert first["padding, hidden by the lowest number"] > 24 * key  # rows that are hidden whole see all that is
    assert second["padding, hidden by the lowest number"] > 24 * key
    balanced = [rank["causal", True, "gather"].sent for rank in of_ranks]
    assert balanced == [12 * key, 24 * key]  # chunks 0 and 3, of which 3 is seen by none; chunks 1 and 2
    ring = [rank["window", False, "ring"].sent for rank in of_ranks]
    assert ring == [6 * key, 0]


def test_inductor_compiles_around_it() -> None:
    for rank in run_ranks(differences, RANKS, ("window",), "inductor"):
        for found in rank.values():
            assert found.fused == (2, 2)
            assert max(found.result, found.gradients) < 2e-6, found


# ------------------------------------------------------------------------------------------------------- what is refused


class Before(nn.Module):
    """Attention to what ``way`` has made of its input."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way, self.attention = way, Attention(Case(causal))
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
    "cumsum reads other positions, of all texts": lambda m, x, at: m.dense(x.flatten(0, 1).cumsum(0)).view(x.shape),
}  # fmt: skip
TAKEN: dict[str, Way] = {
    "layers of each position": lambda m, x, at: m.norm(m.dense(F.gelu(m.dense(x)))) + x,
    "rows of all texts": lambda m, x, at: m.dense(x.reshape(-1, WIDTH).relu()).view(x.shape),
    "rotary positions": lambda m, x, at: torch.cat((-x[..., 16:], x[..., :16]), -1) * at[..., None].sin() + x,
    "rows of a table": lambda m, x, at: x + m.table[at],
    "a choice by position": lambda m, x, at: torch.where(at[..., None] > 5, x, 0),
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
        assert "test_context_parallel.py:" in found[name]


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
        return (p @ (3 * x), score.logsumexp(-1)) if self.way == "log-sum-exp" else p @ (3 * x)


UNREADABLE = {
    "matrix": "mask has queries and keys of this shard alone",
    "no attention": "reads other positions than its own",
    "log-sum-exp": "the log-sum-exp of its rows is read, too",
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


def test_attention_that_cannot_be_that_of_the_whole_is_refused_before_anything_runs() -> None:
    (found,) = run_ranks(refusals, 1)
    for way, part in UNREADABLE.items():
        assert "NotAcrossRanks" in found[way] and part in found[way], (way, found[way])
    assert "its length is 48 in the graph" in found["fixed"]


# --------------------------------------------------------------------------------------------------- shards and options


def sharded(balanced: bool) -> dict[str, object]:
    across = fuse.ContextParallel(dist.group.WORLD, balanced=balanced)
    ids = torch.arange(16).view(2, 8)
    found = fuse.shard_sequence({"input_ids": ids, "labels": ids, "scale": torch.ones(3), "use_cache": False}, across)
    whole = {name: fuse.gather_sequence(found[name], across).tolist() for name in ("input_ids", "position_ids", "shift_labels")}
    try:
        fuse.shard_sequence(torch.zeros(1, 10 if balanced else 9), across)
        error = ""
    except NotAShard as e:
        error = str(e)
    return {name: x.tolist() if isinstance(x, Tensor) else x for name, x in found.items()} | {"whole": whole, "error": error}


@pytest.mark.parametrize("balanced", [False, True])
def test_a_batch_is_split_and_put_together_again(balanced: bool) -> None:
    places = [[0, 1, 6, 7], [2, 3, 4, 5]] if balanced else [[0, 1, 2, 3], [4, 5, 6, 7]]
    for found, at in zip(run_ranks(sharded, RANKS, balanced), places, strict=True):
        assert found["position_ids"] == [at, at]
        assert found["input_ids"] == found["labels"] == [at, [8 + i for i in at]]
        assert found["shift_labels"][0] == [-100 if i == 7 else i + 1 for i in at]
        assert (found["scale"], found["use_cache"]) == ([1, 1, 1], False)
        ids = [list(range(8)), list(range(8, 16))]
        after = [[*row[1:], -100] for row in ids]
        assert found["whole"] == {"input_ids": ids, "position_ids": [ids[0], ids[0]], "shift_labels": after}
        assert "Pad them to a multiple of" in found["error"]


def misused() -> list[str]:
    group, found = dist.group.WORLD, []
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
    assert fuse.ContextParallel(mesh["cp"]).layout.ranks == 1
    for wrong in (
        lambda: fuse.ContextParallel(group, way="star"),
        lambda: fuse.ContextParallel(group, balanced=1),  # type: ignore[arg-type]
        lambda: fuse.ContextParallel(mesh),
        lambda: fuse.ContextParallel("cp"),
    ):
        with pytest.raises(InvalidOption) as error:
            wrong()
        found.append(str(error.value))
    return found


def test_what_a_user_can_get_wrong_is_an_error_at_once() -> None:
    way, balanced, mesh, name = run_ranks(misused, 1)[0]
    assert "cannot be 'star'; allowed: 'auto', 'gather', 'ring'" in way
    assert "context_parallel.balanced" in balanced
    assert "It has 2 dimensions: choose one, as in mesh['cp']" in mesh
    assert "cannot be 'cp'; allowed: a process group" in name
    with pytest.raises(NoRanks):
        fuse.ContextParallel(None)


def in_torchs_context() -> bool:
    from torch.distributed.tensor.experimental import context_parallel

    torch.manual_seed(0)
    model, (x, places) = Layers(CASES["documents"]), batch()
    expected = model(x, places).detach()
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    across = fuse.ContextParallel(mesh, balanced=True)
    compiled = torch.compile(model, backend="fuse", options={"inner": "eager", "context_parallel": across}, dynamic=True)
    buffers = [x, *(t.clone() for t in places)]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
        out = compiled(buffers[0], tuple(buffers[1:]))
    torch.testing.assert_close(fuse.gather_sequence(out, across), expected)
    return True


def test_shards_of_torchs_own_context_are_taken() -> None:
    """Its buffers are balanced by default."""
    assert run_ranks(in_torchs_context, RANKS) == [True] * RANKS


# ------------------------------------------------------------------------------------------------- a rank that dies


def dies() -> None:
    across = fuse.ContextParallel(dist.group.WORLD)
    torch.manual_seed(0)
    x, places = batch()
    compiled = torch.compile(Layers(CASES["causal"]), backend="fuse", options={"inner": "eager", "context_parallel": across})
    own = tuple(fuse.shard_sequence(t, across) for t in places)
    compiled(fuse.shard_sequence(x, across), own)
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 has had enough")
    compiled(fuse.shard_sequence(x, across), own)


def test_a_rank_that_dies_ends_the_others() -> None:
    with pytest.raises(Exception, match="rank 1 has had enough|Connection|closed"):
        run_ranks(dies, RANKS, limit=60)
