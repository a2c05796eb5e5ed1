"""Named problems in which the rounding of a number decides what is seen, or how much it counts."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from problems import B0, K, Problem, Q, case, cast, hide, load, mapped, op, problem, rand

from fuse.ir.expr import HALVES, Expr, Prob, const


def _rounded(position: Expr, dtype: str = "bfloat16") -> Expr:
    return cast(position, dtype)


@case
def positions_in_bfloat16(dtype: str) -> Problem:
    """Causal, but for 256 and 257, which are one number in bfloat16, as are three or four later ones at a time."""
    predicate = op("le", _rounded(K), _rounded(Q))
    return problem(dtype, batch=(1, 1), q_len=550, score=lambda s: hide(s, predicate))


@case
def distance_in_float16(dtype: str) -> Problem:
    """63 * 33 is 2080 in float16."""
    product = op("mul", op("abs", _rounded(op("sub", Q, K), "float16")), 33.0)
    return problem(dtype, batch=(1, 2), q_len=70, score=lambda s: hide(s, op("lt", product, 2080.0)))


@case
def blocks_by_division_in_float32(dtype: str) -> Problem:
    """1 / 41 is no float: what multiplies by it finds 41 in the first block."""
    q, k = (op("floor", op("div", op("add", _rounded(i, "float32"), _rounded(B0, "float32")), 41.0)) for i in (Q, K))
    return problem(dtype, batch=(2, 2), q_len=150, score=lambda s: hide(s, op("eq", q, k)))


@case
def sum_of_products_in_float32(dtype: str) -> Problem:
    """0.1 * d - 0.7 is zero for a distance of 7 if the product is rounded before the difference."""
    slack = op("sub", op("mul", _rounded(op("sub", Q, K), "float32"), 0.1), 0.7)
    predicate = op("or", op("eq", slack, 0.0), op("eq", Q, K))
    return problem(dtype, q_len=70, score=lambda s: hide(s, predicate))


@case
def documents_in_float16(dtype: str) -> Problem:
    """Numbers beyond 2048 of which neighbours are one; what is read of one position is summarised by tile."""
    ids = (2046 + torch.arange(300) // 40).expand(1, 300)
    same = op("eq", _rounded(load(ids, 3, B0, Q), "float16"), _rounded(load(ids, 3, B0, K), "float16"))
    return problem(dtype, ids, batch=(1, 2), q_len=300, score=lambda s: hide(s, same))


@case
def large_numbers_in_float32(dtype: str) -> Problem:
    """int64 of which two neighbours are one float."""
    ids = 2**24 + torch.arange(70)
    same = op("eq", _rounded(load(ids, 3, Q), "float32"), _rounded(load(ids, 3, K), "float32"))
    return problem(dtype, ids, q_len=70, score=lambda s: hide(s, same))


@case
def mapped_by_bfloat16(dtype: str) -> Problem:
    """A tensor of queries and keys, rounded where it is compared: 0.501 is not above one half."""
    x = torch.tensor([0.25, 0.501, 0.75])[rand(150, 150).abs().clamp(max=2).long()]
    predicate = op("gt", _rounded(load(x, 3, Q, K)), 0.5)
    return mapped(problem(dtype, x, batch=(1, 2), q_len=150, score=lambda s: hide(s, predicate, -1e30)))


@case
def score_in_bfloat16_decides(dtype: str) -> Problem:
    """Scores that round to more than 0.5 are halved."""
    return problem(dtype, score=lambda s: op("where", op("gt", cast(s, "bfloat16"), 0.5), op("mul", s, 0.5), s))


@case
def bias_in_steps_of_float16(dtype: str) -> Problem:
    """Added is the whole part of a fraction of the distance, which float16 may round up to a whole number."""
    steps = op("floor", op("mul", _rounded(op("abs", op("sub", Q, K)), "float16"), 0.3333))
    return problem(dtype, batch=(1, 2), q_len=130, score=lambda s: op("sub", s, cast(op("mul", steps, 0.25), s.dtype)))


@case
def coordinate_by_way_of_bfloat16(dtype: str) -> Problem:
    """A table that is read where bfloat16 has the distance."""
    table = rand(400, dtype=dtype)
    place = cast(_rounded(op("abs", op("sub", Q, K))), "int64")
    return problem(dtype, table, batch=(1, 1), q_len=300, score=lambda s: op("add", s, load(table, 3, place)))


@case
def weight_chosen_in_bfloat16(dtype: str) -> Problem:
    weight = op("where", op("le", _rounded(K), _rounded(Q)), Prob(dtype), const(0.0, dtype))
    return problem(dtype, batch=(1, 1), q_len=300, weight=weight)


@case
def overflow_of_float16_decides(dtype: str) -> Problem:
    """65520 and more are infinite in float16."""
    infinite = op("eq", op("mul", _rounded(K, "float16"), 520.0), math.inf)
    return problem(dtype, batch=(1, 2), q_len=130, score=lambda s: op("where", infinite, op("sub", s, 1.0), s))


@case
def low_scores_beside_infinite_ones(dtype: str) -> Problem:
    """Of some rows all that is not -inf is so low that float16 rounds it to multiples of four: forward leaves that out, and
    what backward has of these rows must be of the same probabilities."""
    gate = rand(45, dtype=dtype)
    low = op("where", op("gt", op("floordiv", Q, 4), op("floordiv", K, 4)), const(-8188.0, dtype), const(0.0, dtype))
    return problem(
        dtype, gate, q_len=45,
        score=lambda s: hide(op("add", op("add", s, low), load(gate, 3, Q)), op("lt", K, op("sub", Q, 2))),
    )  # fmt: skip


@case
def result_in_float32(dtype: str) -> Problem:
    """As of each of several terms, which are added up before they are rounded."""
    p = problem(dtype, batch=(1, 2), q_len=70, score=lambda s: hide(s, op("le", K, Q)))
    return replace(p, spec=replace(p.spec, out_dtype="float32" if dtype in HALVES else dtype))
