"""The interval of an operator holds all its values, with the roundings of every dtype."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from proving import (
    FLOAT_DTYPES,
    P,
    free,
    grid,
    torch_value,
)

from fuse.ir import expr
from fuse.ir.expr import Apply, Expr, Load
from fuse.ir.operators import OPERATORS
from fuse.passes import intervals
from fuse.passes.intervals import Range

ENDS = (-math.inf, -3.4e38, -65504.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 7e4, 1e28, math.inf)


def _range_of(operator: str, dtype: str) -> None:
    """The result for any points of any intervals lies in the interval that the operator gives."""
    arity = OPERATORS[operator].arity
    leaves = free(dtype, arity)
    first = (P,) if operator == "where" else ()
    node = Apply(dtype, operator, leaves if not first else (P, *leaves[:2]))
    spans = [(a, b) for a in ENDS for b in ENDS if a <= b]
    chosen = spans if arity == 1 else spans[::7]
    for ends in itertools.product(chosen, repeat=min(arity, 2)):
        known: dict[Expr, Range] = {
            x: Range(expr.rounded(a, dtype), expr.rounded(b, dtype)) for x, (a, b) in zip(leaves, ends, strict=False)
        }
        found = intervals.applied(node, list(known.values()) if not first else [intervals.TRUTH, *known.values()])
        inside = [[x for x in (*ENDS, 0.3, -0.7, 2.5) if r.holds(expr.rounded(x, dtype))] for r in known.values()]
        points = torch.cartesian_prod(
            *(torch.tensor(p, dtype=torch.float64).to(getattr(torch, dtype)) for p in inside)
        ).reshape(-1, len(inside))
        columns = list(points.unbind(-1))
        for truth in (True, False) if first else (True,):
            args = [torch.tensor(truth), *columns] if first else columns
            got = OPERATORS[operator].function(*args).double()
            nan = got.isnan()
            assert found.nan or not nan.any(), (node, known, found)
            exact = operator in (*intervals.RULES, "where", "floor", "ceil", "trunc", "round")
            low, high = (
                x if exact or math.isinf(x) else x + sign * 1e-6 * abs(x) for x, sign in ((found.low, -1), (found.high, 1))
            )
            assert bool(((got >= low) & (got <= high) | nan).all()), (node, known, found)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("operator", [*intervals.RULES, *(o.name for o in OPERATORS.values() if o.rising is not None), "where"])
def test_the_range_of_an_operator_holds_all_its_values(operator: str, dtype: str) -> None:
    _range_of(operator, dtype)


@pytest.mark.parametrize(("source", "target"), [*itertools.product(expr.DTYPES, repeat=2)])
def test_the_range_of_a_cast_holds_all_its_values(source: str, target: str) -> None:
    x = Load(source, 0, ())
    values = {a: expr.rounded(a.value, source) if source in expr.FLOATS else a.value for a in grid(source)}
    for low, high in itertools.combinations_with_replacement(sorted(x for x in values.values() if x == x), 2):
        found = intervals.applied(Apply(target, "cast", (x,)), [Range(float(low), float(high))])
        for a, value in values.items():
            if low <= value <= high and (math.isfinite(value) or target in expr.FLOATS):
                assert found.holds(float(torch_value(Apply(target, "cast", (a,))).item())), (source, target, value, found)
