"""The table of operators: what each row says is so. Derivatives are in test_gradient.py, ranges in test_intervals.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from fuse.ir.expr import COMPARISONS, Apply, Expr, Index, apply, index
from fuse.ir.operators import CALL, OPERATORS, Operator
from fuse.report.wording import score_text

ORDINARY = torch.tensor([-1e3, -2.5, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0, 1e3], dtype=torch.float64)
LOGIC = ("and", "or", "xor", "not")
# Of these a writer asks more than the operands' texts: what they convert, choose or negate.
WRITTEN_BY_RULE = {"cpp": {"where", "cast"}, "triton": {"where", "cast", "not", "uniform"}}


@pytest.mark.parametrize("target", WRITTEN_BY_RULE)
def test_every_operator_has_a_text_for_each_target(target: str) -> None:
    assert {row.name for row in OPERATORS.values() if not getattr(row, target)} == WRITTEN_BY_RULE[target]
    for row in OPERATORS.values():
        for text in (row.cpp, row.triton, row.triton_real):
            if text:
                assert all(f"{{{i}}}" in text for i in range(row.arity)), row.name


@pytest.mark.parametrize("row", [r for r in OPERATORS.values() if r.finite], ids=lambda row: row.name)
def test_what_is_called_finite_is_finite_of_ordinary_numbers(row: Operator) -> None:
    if row.name in ("cast", "uniform"):
        return  # the one hands on its operand, the other has numbers below one
    operands = torch.meshgrid(*[ORDINARY] * row.arity, indexing="ij")
    if row.name in LOGIC or row.name == "where":
        operands = (operands[0] > 0, *operands[1:]) if row.name == "where" else tuple(x > 0 for x in operands)
    assert row.function(*operands).isfinite().all()


def test_signs_bind_as_in_python() -> None:
    """Every pair of integer operators with signs: their text, read by Python, has the value of the expression."""
    scope = {"q": 7, "k": 3, "b0": 2}
    q, k, b = (index(axis) for axis in scope)
    signed = [r.name for r in OPERATORS.values() if r.binds < CALL and r.arity == 2 and r.name not in (*LOGIC, "div", "pow")]
    for outer, inner in itertools.product(signed, [name for name in signed if name not in COMPARISONS]):
        x = apply(inner, q, k, dtype="int64")
        for operands in ((x, b), (b, x)):
            node = apply(outer, *operands, dtype="bool" if outer in COMPARISONS else "int64")
            text = score_text(node, {})
            assert eval(text, {}, scope) == value(node, scope).item(), text


def value(node: Expr, scope: dict[str, int]) -> torch.Tensor:
    if isinstance(node, Index):
        return torch.tensor(scope[node.axis])
    assert isinstance(node, Apply)
    return OPERATORS[node.op].function(*(value(x, scope) for x in node.operands))
