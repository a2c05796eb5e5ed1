"""A sequence on two ranks: results and gradients are those of the whole, what travels is what the mask lets be seen, and what
cannot be done is refused by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from sharded import CASES, GROUPS, HEADS, RANKS, TEXTS, WIDTH, Case, Layers, batch, block_mask
from torch import Tensor

import fuse
from fuse.errors import InvalidOption, NoRanks, NotAShard
from fuse.parallel.exchange import _packed, _unpacked, like, traffic

LAYOUTS = [(balanced, way) for balanced in (False, True) for way in ("gather", "ring")] + [(True, "auto")]
FEW = [(False, "gather"), (True, "ring")]
IN_FEW = (
    "before, hidden by the lowest number", "prefix", "FlexAttention", "sigmoid", "squared ReLU", "retention",
    "a share of positive scores",
)  # fmt: skip
EACH = {name: FEW if name in IN_FEW else LAYOUTS for name in CASES}


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
    plain = Layers(dataclasses.replace(case, flex=False)).to(case.dtype)  # FlexAttention has no gradients on CPUs
    plain.load_state_dict(model.state_dict())
    expected = plain(whole, places)
    (expected * weights).sum().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}

    options = {"inner": inner, "context_parallel": across}
    compiled = torch.compile(
        model, backend="fuse", options=options, dynamic=case.flex or None, fullgraph=True
    )  # a BlockMask holds lengths
    shard, own = fuse.shard_sequence(x, across).requires_grad_(), tuple(fuse.shard_sequence(t, across) for t in places)
    torch._dynamo.maybe_mark_dynamic(shard, 1)
    own = (*own, block_mask(own[1], shard.shape[1])) if case.flex else own
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
        for balanced, way in EACH[name]:
            torch._dynamo.reset()
            fuse.reset()
            across = fuse.ContextParallel(dist.group.WORLD, balanced=balanced, way=way)
            found[name, balanced, way] = difference(CASES[name], across, inner)
    return found


def check(found: Difference, allowed: float = 2e-6) -> None:
    assert found.fused == (2, 2)
    assert max(found.result, found.gradients) < allowed, found


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[tuple[str, bool, str], Difference]]:
    return run_ranks(differences, RANKS, tuple(CASES), "eager", limit=600)


@pytest.mark.parametrize(("name", "balanced", "way"), [(name, *layout) for name in CASES for layout in EACH[name]])
def test_attention_of_shards_is_that_of_the_whole(name: str, balanced: bool, way: str, of_ranks: list) -> None:
    allowed = 2e-6 if CASES[name].dtype == torch.float32 else 4e-2
    for rank in of_ranks:
        check(rank[name, balanced, way], allowed)


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


@pytest.mark.parametrize(
    ("ranks", "names", "inner"), [(RANKS, ("window",), "inductor"), (3, ("causal", "both sides"), "eager")]
)
def test_so_it_is_with_inductor_and_on_three_ranks(ranks: int, names: tuple[str, ...], inner: str) -> None:
    """On two, the rank before is the rank after."""
    for rank in run_ranks(differences, ranks, names, inner):
        for found in rank.values():
            check(found)


def in_float16() -> float:
    """The share of the result's numbers that a ring gives as gathering does, by kernels that round nothing else to 16 bits."""
    x, _ = batch()
    results = []
    for way in ("gather", "ring"):
        across = fuse.ContextParallel(dist.group.WORLD, way=way)
        shard = fuse.shard_sequence(x.half().unflatten(-1, (HEADS, -1)), across)
        options = {"inner": "eager", "context_parallel": across, "target": "cpp"}
        torch._dynamo.reset()
        results.append(torch.compile(of_heads, backend="fuse", options=options)(shard))
    return float((results[0] == results[1]).float().mean())


def of_heads(x: Tensor) -> Tensor:
    heads = x.transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads.sin()).transpose(1, 2)


@pytest.mark.compiler
def test_parts_of_a_ring_are_merged_before_they_are_rounded() -> None:
    assert all(alike > 0.99 for alike in run_ranks(in_float16, RANKS))


def test_tensors_of_one_exchange_may_begin_between_elements() -> None:
    sent = [torch.tensor([True, False, True]), torch.tensor([1.5, -2.0])]
    received = _unpacked(_packed(sent, sent[0].device), [like(x, len(x)) for x in sent])
    assert all(torch.equal(x, y) for x, y in zip(received, sent, strict=True))


# --------------------------------------------------------------------------------------------------- shards and options


def sharded(balanced: bool) -> dict[str, object]:
    across = fuse.ContextParallel(dist.group.WORLD, balanced=balanced)
    ids = torch.arange(16).view(2, 8)
    others = {"pixels": torch.ones(2, 4, 4), "scale": torch.ones(3), "use_cache": False}  # first, and of other lengths
    found = fuse.shard_sequence({**others, "input_ids": ids, "labels": ids}, across)
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
        assert torch.tensor(found["pixels"]).shape == (2, 4, 4)
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


# ------------------------------------------------------------------------------------- ranks that do not go together


def unlike(balanced: bool) -> list[str]:
    """What a rank says whose shard has another length, an odd one, or other texts than those of the others, and then runs."""
    across, found = fuse.ContextParallel(dist.group.WORLD, balanced=balanced), []
    compiled = torch.compile(Layers(CASES["causal"]), backend="fuse", options={"inner": "eager", "context_parallel": across})
    x, places = batch()
    rank = dist.get_rank()
    for texts, length in ((2, 24 - 4 * rank), (2, 23), (2 - rank, 24), (2, 24)):
        own = [t[:texts, :length].clone() for t in (x, *places)]
        for t in own:
            torch._dynamo.maybe_mark_dynamic(t, 1)
        try:
            compiled(own[0], tuple(own[1:]))
            found.append("ran")
        except NotAShard as e:
            found.append(str(e))
    return found


@pytest.mark.parametrize("balanced", [False, True])
def test_ranks_whose_shards_are_not_alike_are_told_so_at_once(balanced: bool) -> None:
    """Each of them, and all go on together."""
    for lengths, odd, others, alike in run_ranks(unlike, RANKS, balanced, limit=60):
        assert "these are not: 24 on rank 0, 20 on rank 1. Give every rank its shard of one batch" in lengths
        assert ("a balanced shard has two halves, this one has 23 positions" in odd) if balanced else odd == "ran"
        assert "ranks do not attend alike: their batches have other sizes" in others
        assert alike == "ran"


def of_other_documents() -> str:
    """What a function of FlexAttention reads by position is not the shard's: nothing in the graph tells."""
    across, (x, places) = fuse.ContextParallel(dist.group.WORLD), batch()
    options = {"inner": "eager", "context_parallel": across}
    compiled = torch.compile(Layers(CASES["FlexAttention"]), backend="fuse", options=options, dynamic=True, fullgraph=True)
    shard, own = fuse.shard_sequence(x, across), tuple(fuse.shard_sequence(t, across) for t in places)
    try:
        for documents in (own[1], places[1]):
            compiled(shard, (*own, block_mask(documents, shard.shape[1])))
        return "ran"
    except NotAShard as e:
        return str(e)


def test_a_tensor_that_is_not_the_shards_is_an_error_where_it_is_read() -> None:
    for found in run_ranks(of_other_documents, RANKS):
        assert "a tensor of 48 positions is read in the attention of a shard of 24" in found


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
