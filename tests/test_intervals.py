"""The range of an operator holds all its values: integers wrap, floats are rounded. Ends are numbers, or tensors of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from interval_cases import CASES, Case, check
from torch import Tensor

from fuse.ir.expr import FLOATS
from fuse.ir.interval import Range, applied, as_tensor, in_dtype

FEW = 500


def on_numbers(case: Case, args: Sequence[Range]) -> Range:
    number: Any = bool if case.dtype == "bool" else float if case.dtype in FLOATS else int
    columns = [zip(*(x.tolist() for x in (r.low, r.high, r.nan)), strict=True) for r in args]
    rows = [
        [Range(bool(low), bool(high)) if dtype == "bool" else Range(low, high, nan) for dtype, (low, high, nan) in
         zip(case.sources, row, strict=True)]
        for row in zip(*columns, strict=True)
    ]  # fmt: skip
    node = case.node
    found = [applied(node, row) for row in rows]
    assert all(isinstance(x, number) for r in found for x in (r.low, r.high))
    wide = torch.float64 if case.dtype in FLOATS else torch.int64
    low, high = (torch.tensor([getattr(r, end) for r in found], dtype=wide) for end in ("low", "high"))
    return Range(low, high, torch.tensor([r.nan for r in found]))


def on_tensors(case: Case, args: Sequence[Range]) -> Range:
    taken = [
        Range(r.low.bool(), r.high.bool())
        if dtype == "bool"
        else in_dtype(Range(r.low.double(), r.high.double(), r.nan), dtype)
        for dtype, r in zip(case.sources, args, strict=True)
    ]
    found = applied(case.node, taken)
    shape = args[0].low.shape
    low, high = (_wide(as_tensor(x), case.dtype).expand(shape) for x in (found.low, found.high))
    return Range(low, high, torch.as_tensor(found.nan).expand(shape))


def _wide(ends: Tensor, dtype: str) -> Tensor:
    """As int64, in which the largest end of a float64 is one less."""
    if dtype in FLOATS:
        return ends.double()
    return torch.where(ends.double() >= 2.0**63, 2**63 - 1, ends.long())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_range_of_an_operation_holds_all_its_values(case: Case) -> None:
    check(case, on_tensors)
    check(case, on_numbers, at_most=FEW)
