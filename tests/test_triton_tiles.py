"""Lists of tiles on the Triton target: nothing that is seen is left out, and what is full is said to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import check, floats, run
from problems import B0, LOWEST, K, Problem, Q, both, hide, load, mapped, op, problem
from specs import CASES
from torch import Tensor

from fuse.ir.expr import const
from fuse.ir.grid import Grid
from fuse.targets.triton.plan_backward import Launch
from fuse.targets.triton.render_tiles import is_listed

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.targets.triton import launch_tiles  # noqa: E402
from fuse.targets.triton.arguments import Arguments  # noqa: E402
from fuse.targets.triton.launch_backward import TritonBackward  # noqa: E402
from fuse.targets.triton.launch_tiles import TritonTiles  # noqa: E402

PLAN = Launch(block_q=32, block_k=32, warps=4, stages=2)
LISTED = (
    "documents_in_any_order", "documents", "mapped_bool", "mapped_bool_with_lowest_fill_below_the_diagonal", "padding",
    "left_padding_and_causal", "block_diagonal_or_first_keys", "dilated", "prefix",
    "listed_blocks",
)  # fmt: skip
OF_KEYS = ("padding", "left_padding_and_causal")
LISTS = [(n, "q") for n in LISTED] + [(n, "k") for n in LISTED if n not in OF_KEYS]
EXACT = ("documents", "left_padding_and_causal", "padding", "block_diagonal_or_first_keys", "listed_blocks")


@pytest.fixture(autouse=True)
def _short_calls_have_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_tiles, "UNLISTED", 0)


def visited(made: Problem, owner: str, plan: Launch = PLAN) -> tuple[Tensor, Tensor]:
    """(tiles visited with mask code, tiles visited without), bool of shape (lists, blocks of queries, tiles of keys)."""
    given = Arguments(made.spec).of(made.operands, made.sizes)
    found, listed = TritonTiles(made.spec, owner).of(given, made.sizes, plan, torch.empty(0))
    lists, counts = found["tiles"], found["tile_counts"]
    assert listed
    (length, block), (_, tile) = blocks_of(made, owner, plan)
    count = lists.shape[1]
    partial, full = torch.zeros(2, *lists.shape, dtype=torch.bool)
    for place, (first, second) in enumerate(counts.tolist()):
        tiles = lists[place] // tile
        partial[place, tiles[:first]] = True
        full[place, tiles[count - second :]] = True
    partial, full = (x.unflatten(0, (-1, -(-length // block))) for x in (partial, full))
    return (partial, full) if owner == "q" else (partial.mT, full.mT)


def blocks_of(made: Problem, owner: str, plan: Launch) -> list[tuple[int, int]]:
    """(length, size of a block) of the owner, then of the other side."""
    q_len, kv_len = made.sizes[made.spec.batch : made.spec.batch + 2]
    sides = [(q_len, plan.block_q), (kv_len, plan.block_k)]
    return sides if owner == "q" else sides[::-1]


def seen(made: Problem, owner: str, plan: Launch = PLAN) -> tuple[Tensor, Tensor]:
    """(tiles of which something is seen, tiles of which everything is), likewise; a tail of what is visited is never full."""
    spec, sizes = made.spec, dict(zip(made.spec.symbols, made.sizes, strict=True))
    assert spec.mask is not None
    extents = {f"b{i}": (0, sizes[f"B{i}"]) for i in range(spec.batch)} | {"q": (0, sizes["q_len"]), "k": (0, sizes["kv_len"])}
    entries = Grid.over(extents, sizes, made.operands, exact=False).evaluate(spec.mask.predicate, {})
    entries = entries.flatten(0, -3) if entries.dim() > 2 else entries[None]
    entries = entries.expand(-1, sizes["q_len"], sizes["kv_len"])
    rows = [block.split(plan.block_k, -1) for block in entries.split(plan.block_q, -2)]
    some = torch.stack([torch.stack([tile.any((-1, -2)) for tile in row], -1) for row in rows], -2)
    whole = torch.stack([torch.stack([tile.all((-1, -2)) for tile in row], -1) for row in rows], -2)
    _, (length, tile) = blocks_of(made, owner, plan)
    beyond = torch.arange(whole.shape[-1 if owner == "q" else -2]) >= length // tile
    return some, whole & ~(beyond if owner == "q" else beyond[:, None])


@pytest.mark.parametrize("plan", [PLAN, Launch(64, 128, 4, 2), Launch(16, 64, 4, 2)], ids=lambda p: f"{p.block_q}x{p.block_k}")
@pytest.mark.parametrize(("name", "owner"), LISTS)
def test_what_is_seen_is_visited_and_what_is_said_to_be_full_is(name: str, owner: str, plan: Launch) -> None:
    made = CASES[name]("float32")
    (partial, full), (some, whole) = visited(made, owner, plan), seen(made, owner, plan)
    assert not (some & ~(partial | full)).any()
    assert not (full & ~whole).any()
    assert not (partial & full).any()


@pytest.mark.parametrize(("name", "owner"), [(n, o) for n, o in LISTS if n in EXACT])
def test_tiles_are_told_apart_as_well_as_can_be(name: str, owner: str) -> None:
    made = CASES[name]("float32")
    (partial, full), (some, whole) = visited(made, owner), seen(made, owner)
    assert torch.equal((partial | full).expand_as(some), some)
    assert torch.equal(full.expand_as(whole), whole)


@pytest.mark.parametrize("owner", ["q", "k"])
def test_heads_that_share_a_mask_share_its_list(owner: str) -> None:
    made = CASES["documents"]("float32")
    assert visited(made, owner)[0].shape[0] == made.sizes[0] < made.sizes[0] * made.sizes[1]


def documents() -> Problem:
    """Of two batches, in which heads share keys and values."""
    ids = torch.stack((torch.arange(150) // 70, torch.arange(150) // 100))
    predicate = both(op("le", K, Q), op("eq", load(ids, 3, B0, Q), load(ids, 3, B0, K)))
    shared: dict[str, Any] = {"kv_batch": (2, 1), "kv_index": (B0, const(0))}
    return problem("float32", ids, batch=(2, 2), q_len=150, score=lambda s: hide(s, predicate), **shared)


def blocks() -> Problem:
    same = op("eq", op("floordiv", Q, 70), op("floordiv", K, 70))
    return problem("float32", batch=(1, 1), q_len=150, kv_len=110, score=lambda s: hide(s, op("or", same, op("lt", K, 3))))


def mapped_bool() -> Problem:
    keep = torch.ones(170, 150, dtype=torch.bool).tril()
    keep[40:80, :64], keep[160:] = False, True
    return mapped(
        problem("float32", keep, batch=(1, 1), q_len=170, kv_len=150, score=lambda s: hide(s, load(keep, 3, Q, K), -1e9))
    )


def mapped_bool_below_the_diagonal() -> Problem:
    """Rows 80 to 95 see nothing."""
    keep = torch.ones(150, 150, dtype=torch.bool)
    keep[70:120, 10:64], keep[80:96] = False, False
    residual, upper = load(keep, 3, Q, K), op("add", Q, 1)
    predicate = both(op("le", K, Q), residual)
    return mapped(
        problem(
            "float32", keep, batch=(1, 1), q_len=150,
            score=lambda s: hide(s, predicate, LOWEST["float32"], upper=upper, residual=residual),
        )
    )  # fmt: skip


def left_padding_and_causal() -> Problem:
    return CASES["left_padding_and_causal"]("float32")


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize(
    "make", [documents, blocks, mapped_bool, mapped_bool_below_the_diagonal, left_padding_and_causal], ids=lambda f: f.__name__
)
def test_gradients_sum_the_tiles_in_the_lists(make: Callable[[], Problem]) -> None:
    """Of each kind there are some."""
    made = make()
    backward = TritonBackward(made.spec, floats(made))
    plan = backward.plans.planned(torch.device("cpu"))
    for owner, launch in (("q", plan.queries), ("k", plan.keys)):
        if is_listed(made.spec, owner):
            partial, full = visited(made, owner, launch)
            assert partial.any() and full.any() and not (partial | full).all()
    check(made, run(made, backward), floats(made))
