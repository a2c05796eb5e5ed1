"""Lists of tiles on the Triton target: nothing that is seen is left out, what is full is said to be, and ranges are sound."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem
from specs import CASES
from torch import Tensor

from fuse.codegen.render import environment
from fuse.frame import Frame
from fuse.planner_triton import TritonPlan

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter

from fuse.runtime.triton_module import load  # noqa: E402
from fuse.runtime.triton_tiles import TritonTiles  # noqa: E402

PLAN = TritonPlan(16, 16, block_q=32, block_k=32, warps=4, stages=2)
LISTED = (
    "documents_in_any_order", "documents", "mapped_bool", "mapped_bool_with_lowest_fill_below_the_diagonal", "padding",
    "left_padding_and_causal", "block_diagonal_or_first_keys", "dilated", "prefix",
)  # fmt: skip


def visited(made: Problem) -> tuple[Tensor, Tensor]:
    """(tiles visited with mask code, tiles visited without), bool of shape (lists, blocks of queries, tiles of keys)."""
    spec, sizes = made.spec, made.sizes
    views = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in made.operands]
    extents = [n for t in views for n in (*t.shape, *t.stride())]
    out = torch.empty(0)
    (lists, counts), listed = TritonTiles(spec, few=0).of((*views, *sizes, *extents), sizes, PLAN, out)
    assert listed
    blocks, count = -(-sizes[spec.batch] // PLAN.block_q), lists.shape[1]
    partial, full = torch.zeros(2, *lists.shape, dtype=torch.bool)
    for place, (first, second) in enumerate(counts.tolist()):
        tiles = lists[place] // PLAN.block_k
        partial[place, tiles[:first]] = True
        full[place, tiles[count - second :]] = True
    return partial.unflatten(0, (-1, blocks)), full.unflatten(0, (-1, blocks))


def seen(made: Problem) -> tuple[Tensor, Tensor]:
    """(tiles of which something is seen, tiles of which everything is), likewise."""
    spec, sizes = made.spec, dict(zip(made.spec.symbols, made.sizes, strict=True))
    assert spec.mask is not None
    extents = {f"b{i}": (0, sizes[f"B{i}"]) for i in range(spec.batch)} | {"q": (0, sizes["q_len"]), "k": (0, sizes["kv_len"])}
    entries = Frame.over(extents, sizes, made.operands, exact=False).evaluate(spec.mask.predicate, {})
    entries = entries.flatten(0, -3) if entries.dim() > 2 else entries[None]
    entries = entries.expand(-1, sizes["q_len"], sizes["kv_len"])
    rows = [block.split(PLAN.block_k, -1) for block in entries.split(PLAN.block_q, -2)]
    some = [[tile.any((-1, -2)) for tile in row] for row in rows]
    whole = [[tile.all((-1, -2)) & (tile.shape[-1] == PLAN.block_k) for tile in row] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in some], -2), torch.stack([torch.stack(row, -1) for row in whole], -2)


@pytest.mark.parametrize("name", LISTED)
def test_what_is_seen_is_visited_and_what_is_said_to_be_full_is(name: str) -> None:
    made = CASES[name]("float32")
    (partial, full), (some, whole) = visited(made), seen(made)
    assert not (some & ~(partial | full)).any()
    assert not (full & ~whole).any()
    assert not (partial & full).any()


@pytest.mark.parametrize("name", ["documents", "left_padding_and_causal", "padding", "block_diagonal_or_first_keys"])
def test_tiles_are_told_apart_as_well_as_can_be(name: str) -> None:
    made = CASES[name]("float32")
    (partial, full), (some, whole) = visited(made), seen(made)
    assert torch.equal((partial | full).expand_as(some), some)
    assert torch.equal(full.expand_as(whole), whole)


def test_heads_that_share_a_mask_share_its_list() -> None:
    made = CASES["documents"]("float32")
    assert visited(made)[0].shape[0] == made.sizes[0] < made.sizes[0] * made.sizes[1]


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
    load(path).run[(1,)](inputs, to, size)
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
