"""The range of an operator holds all its values: integers wrap, floats are rounded. Ends are numbers, or tensors of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from interval_cases import CASES, Case, check
from torch import Tensor

from fuse.ir.expr import FLOATS, Expr, Load, apply, index, op, symbol
from fuse.ir.interval import MAX_LENGTH, WHOLE, Range, anywhere, applied, as_tensor, in_call, in_dtype, range_of

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


K, Q = index("k"), index("q")
DATA = Load("int64", 3, (K,))


def cast(x: Expr, dtype: str) -> Expr:
    return apply("cast", x, dtype=dtype)


@pytest.mark.parametrize(
    ("integer", "expected"),
    [
        (op("sub", Q, K), Range(-MAX_LENGTH, MAX_LENGTH)),
        (cast(cast(K, "int8"), "int64"), Range(-128, 127)),
        (cast(op("sub", cast(K, "uint8"), 1), "int64"), Range(0, 255)),
        (cast(op("mul", cast(K, "int32"), 256), "int64"), WHOLE["int32"]),
        (op("mul", op("mul", K, K), op("mul", K, K)), WHOLE["int64"]),
        (op("mul", K, K), Range(0, MAX_LENGTH**2)),
        (cast(cast(op("sub", K, 3), "bool"), "int64"), Range(0, 1)),
        (op("minimum", op("maximum", DATA, 0), 9), Range(0, 9)),
        (cast(cast(K, "float32"), "int64"), WHOLE["int64"]),
        (op("add", symbol("shift"), 1), WHOLE["int64"]),
        (op("add", symbol("kv_len"), 1), Range(1, MAX_LENGTH + 1)),
    ],
    ids=str,
)
def test_the_bounds_of_an_integer_are_those_that_hold_in_every_call(integer: Expr, expected: Range) -> None:
    assert range_of(integer, anywhere) == expected


def test_in_a_call_lengths_are_known() -> None:
    leaves = in_call({"B0": 2, "q_len": 5, "kv_len": 7, "shift": 3}, {"d": 16})
    found = [range_of(e, leaves) for e in (index("b0"), Q, K, index("d"), op("add", Q, symbol("shift")))]
    assert found == [Range(0, 1), Range(0, 4), Range(0, 6), Range(0, 15), Range(3, 7)]


def test_of_many_ranges_some_may_be_known_by_one_number() -> None:
    """What is chosen in each of two tiles is the same unknown integer, twice which wraps."""
    tiles = {Q: Range(torch.tensor([0.0, 8.0]), torch.tensor([7.0, 15.0])), K: Range(torch.tensor(4.0), torch.tensor(5.0))}
    chosen = apply("where", op("le", K, Q), DATA, Load("int64", 4, (K,)), dtype="int64")
    found = range_of(op("mul", chosen, 2), lambda leaf: tiles.get(leaf) or anywhere(leaf))
    assert found.low.tolist() == [-(2.0**63)] * 2 and found.high.tolist() == [2.0**63] * 2
