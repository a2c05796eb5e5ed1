"""Lists of tiles on the Triton target: nothing that is seen is left out, what is full is said to be, and ranges are sound."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import check, floats, run
from problems import B0, LOWEST, K, Problem, Q, both, hide, load, mapped, op, problem
from specs import CASES
from torch import Tensor

from fuse.ir.expr import const
from fuse.ir.grid import Frame
from fuse.kernel.source import environment
from fuse.targets.triton.plan_backward import Launch
from fuse.targets.triton.render_tiles import is_listed

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.targets.triton import launch_tiles  # noqa: E402
from fuse.targets.triton.launch_backward import TritonBackward  # noqa: E402
from fuse.targets.triton.launch_tiles import TritonTiles  # noqa: E402
from fuse.targets.triton.module import load as load_module  # noqa: E402

PLAN = Launch(block_q=32, block_k=32, warps=4, stages=2)
LISTED = (
    "documents_in_any_order", "documents", "mapped_bool", "mapped_bool_with_lowest_fill_below_the_diagonal", "padding",
    "left_padding_and_causal", "block_diagonal_or_first_keys", "dilated", "prefix",
)  # fmt: skip
OF_KEYS = ("padding", "left_padding_and_causal")
LISTS = [(n, "q") for n in LISTED] + [(n, "k") for n in LISTED if n not in OF_KEYS]
EXACT = ("documents", "left_padding_and_causal", "padding", "block_diagonal_or_first_keys")


@pytest.fixture(autouse=True)
def _short_calls_have_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_tiles, "FEW", 0)


def visited(made: Problem, owner: str, plan: Launch = PLAN) -> tuple[Tensor, Tensor]:
    """(tiles visited with mask code, tiles visited without), bool of shape (lists, blocks of queries, tiles of keys)."""
    spec, sizes = made.spec, made.sizes
    views = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in made.operands]
    extents = [n for t in views for n in (*t.shape, *t.stride())]
    (lists, counts), listed = TritonTiles(spec, owner).of((*views, *sizes, *extents), sizes, plan, torch.empty(0))
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
    entries = Frame.over(extents, sizes, made.operands, exact=False).evaluate(spec.mask.predicate, {})
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


# ------------------------------------------------------------------------------------------------------------- ranges

BOUND = 4
RANGES = [(a, b) for a in range(-BOUND, BOUND + 1) for b in range(a, BOUND + 1)]
INTEGERS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "minimum": min, "maximum": max,
    "floordiv": lambda a, b: a // b if b else None, "mod": lambda a, b: a % b if b else None,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "neg": lambda a, _: -a, "abs": lambda a, _: abs(a),
}  # fmt: skip
TRUTHS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "eq": operator.eq, "ne": operator.ne}
KERNEL = """
@triton.jit
def run(inputs, to, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(inputs + i){convert}, tl.load(inputs + N + i){convert}
    b = tl.load(inputs + 2 * N + i){convert}, tl.load(inputs + 3 * N + i){convert}
    low, high = {call}
    tl.store(to + i, tl.cast(low, tl.int64))
    tl.store(to + N + i, tl.cast(high, tl.int64))
"""


def results(folder: Path, call: str, pairs: list[tuple[tuple[int, int], tuple[int, int]]], convert: str = "") -> list[Any]:
    """What ``call`` gives for each pair of ranges (a, b)."""
    parts = ["triton/functions.py.jinja", "triton/ranges.py.jinja"]
    text = "\n\n".join(environment().get_template(part).render() for part in parts)
    path = folder / "ranges.py"
    path.write_text(f"import triton\nimport triton.language as tl\n{text}\n{KERNEL.format(call=call, convert=convert)}")
    size = 1 << (len(pairs) - 1).bit_length()
    inputs = torch.zeros(4, size, dtype=torch.int64)
    inputs[:, : len(pairs)] = torch.tensor([[*a, *b] for a, b in pairs]).T
    to = torch.zeros(2, size, dtype=torch.int64)
    load_module(path).run[(1,)](inputs, to, size)
    found: list[Any] = to.T[: len(pairs)].tolist()
    return found


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_lies_in_the_range_of_its_operation(name: str, tmp_path: Path) -> None:
    unary, of_truth = name in ("neg", "abs"), name in ("lt", "le", "gt", "ge", "eq", "ne")
    pairs = list(itertools.product(RANGES, RANGES))
    for (a, b), (first, second) in zip(pairs, results(tmp_path, f"int_{name}(a{'' if unary else ', b'})", pairs), strict=True):
        values = {INTEGERS[name](x, y) for x in range(a[0], a[1] + 1) for y in range(b[0], b[1] + 1)} - {None}
        expected = (True in values, False not in values) if of_truth else (min(values, default=0), max(values, default=0))
        assert (second <= expected[1] <= expected[0] <= first) if of_truth else (first <= expected[0] <= expected[1] <= second)


@pytest.mark.parametrize("name", TRUTHS)
def test_every_truth_value_lies_in_the_range_of_its_operation(name: str, tmp_path: Path) -> None:
    truths = [(1, 1), (1, 0), (0, 0)]  # (can, must)
    pairs = list(itertools.product(truths, truths))
    for (a, b), (can, must) in zip(pairs, results(tmp_path, f"truth_{name}(a, b)", pairs, " != 0"), strict=True):
        values = {TRUTHS[name](x, y) for x in _values(a) for y in _values(b)}
        assert can >= (True in values) and must <= (False not in values)


def _values(truth: tuple[int, int]) -> set[bool]:
    can, must = truth
    return {value for value, possible in ((True, can), (False, not must)) if possible}


def test_integers_that_may_overflow_can_be_anything(tmp_path: Path) -> None:
    large = 2**59
    for call in ("int_add(int_add(a, b), int_add(a, b))", "int_mul(a, b)", "int_abs(int_add(a, b))"):
        ((low, high),) = results(tmp_path, call, [((large, large), (large, large))])
        assert (low, high) == (-(2**60), 2**60)


def test_what_is_chosen_lies_in_the_range_of_the_choice(tmp_path: Path) -> None:
    pairs = list(itertools.product(RANGES, RANGES))
    for condition, index in (("(a[0] == a[0], a[0] == a[0])", 0), ("(a[0] != a[0], a[0] != a[0])", 1)):
        assert results(tmp_path, f"int_where({condition}, a, b)", pairs) == [list(pair[index]) for pair in pairs]
    either = [[min(a[0], b[0]), max(a[1], b[1])] for a, b in pairs]
    assert results(tmp_path, "int_where((a[0] == a[0], a[0] != a[0]), a, b)", pairs) == either
