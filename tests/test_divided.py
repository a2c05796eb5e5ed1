"""A part of a batch index is a call by itself where the spec says so: parts one behind another are the whole."""

from __future__ import annotations

import pytest
import torch
from problems import Problem
from specs import CASES, RANDOM_CASES
from torch import Tensor

from fuse.ir.divided import Counted, counted
from fuse.targets import reference


def parts_of(p: Problem, number: int, parts: int) -> Tensor | None:
    """The results of equal parts, joined; None where the spec or the sizes do not allow them."""
    ways, count = counted(p.spec, number), p.sizes[number]
    if ways is None or count % parts or not all(w.fits(p.operands[i].shape[w.dim], count, parts) for i, w in ways.items()):
        return None
    sizes = [n // parts if i == number else n for i, n in enumerate(p.sizes)]
    found = []
    for part in range(parts):
        own = [t.chunk(parts, ways[i].dim)[part] if i in ways else t for i, t in enumerate(p.operands)]
        found.append(reference.attention(p.spec, own, sizes))
    return torch.cat(found, number)


@pytest.mark.parametrize("name", [*CASES, *RANDOM_CASES])
def test_parts_of_a_batch_index_are_the_whole(name: str) -> None:
    p = (CASES | RANDOM_CASES)[name]("float32")
    whole = reference.attention(p.spec, p.operands, p.sizes)
    for number in range(p.spec.batch):
        for parts in range(2, p.sizes[number] + 1):
            if (joined := parts_of(p, number, parts)) is not None:
                torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12, equal_nan=True)


def ways(name: str, number: int, dtype: str = "float32") -> dict[int, Counted] | None:
    found = counted((CASES | RANDOM_CASES)[name](dtype).spec, number)
    return None if found is None else dict(found)


def test_dimensions_that_count_an_index_one_by_one_are_divided_with_it() -> None:
    assert ways("plain", 0) == {i: Counted(0) for i in range(3)}
    assert ways("plain", 1) == {i: Counted(1) for i in range(3)}


def test_heads_that_share_keys_stay_together() -> None:
    found = ways("grouped_query", 1)
    assert found is not None and found[1].group > 1
    heads = CASES["grouped_query"]("float32").sizes[1]
    assert not found[1].fits(heads // found[1].group, heads, heads)
    assert found[1].fits(heads // found[1].group, heads, heads // found[1].group)


def test_an_operand_that_all_share_is_read_whole() -> None:
    assert set(ways("relative_table", 0) or ()) == {0, 1, 2}


def test_random_numbers_that_count_an_index_are_not_divided_by_it() -> None:
    assert ways("dropout", 0) is None and ways("dropout", 1) is None
