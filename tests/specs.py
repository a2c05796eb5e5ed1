"""Named attention problems that every target must solve: CASES maps a name to a function of the dtype.

problem = CASES["causal"]("bfloat16")
problem.check(kernel(problem.operands, problem.sizes))

Those of RANDOM_CASES draw random numbers.
"""

from __future__ import annotations

from dataclasses import replace

import mask_specs  # noqa: F401  (it registers its problems)
import normalisation_specs  # noqa: F401  (likewise)
import rounding_specs  # noqa: F401  (likewise)
import torch
from problems import (
    B0,
    B1,
    CASES,
    KV_LEN,
    Q_LEN,
    RANDOM_CASES,
    D,
    E,
    K,
    Problem,
    Q,
    case,
    cast,
    causal_mask,
    load,
    op,
    problem,
    rand,
    random_case,
)
from torch import Tensor

from fuse.ir import expr
from fuse.ir.expr import Expr, Load, Prob, Score, const, symbol
from fuse.ir.spec import Operand

__all__ = ["CASES", "RANDOM_CASES"]

# ------------------------------------------------------------------------------------------------ shapes and layouts


@case
def plain(dtype: str) -> Problem:
    return problem(dtype)


@case
def unscaled(dtype: str) -> Problem:
    return problem(dtype, qk_dim=4, score=lambda s: Score(dtype))


@case
def no_batch(dtype: str) -> Problem:
    return problem(dtype, batch=())


@case
def one_batch_dimension(dtype: str) -> Problem:
    return problem(dtype, batch=(5,))


@case
def three_batch_dimensions(dtype: str) -> Problem:
    return problem(dtype, batch=(2, 3, 2), q_len=9)


@case
def one_query(dtype: str) -> Problem:
    return problem(dtype, q_len=1, kv_len=130)


@case
def one_key(dtype: str) -> Problem:
    return problem(dtype, q_len=7, kv_len=1)


@case
def empty_batch(dtype: str) -> Problem:
    return problem(dtype, batch=(0, 3))


@case
def no_keys(dtype: str) -> Problem:
    """An empty sum, whatever the softmax of nothing is."""
    return problem(dtype, kv_len=0)


@case
def no_queries(dtype: str) -> Problem:
    return problem(dtype, q_len=0, kv_len=5, score=causal_mask)


@case
def vit_length(dtype: str) -> Problem:
    return problem(dtype, batch=(1, 2), q_len=197, qk_dim=64)


@case
def head_dim_24(dtype: str) -> Problem:
    return problem(dtype, qk_dim=24)


@case
def head_dim_80(dtype: str) -> Problem:
    return problem(dtype, qk_dim=80, q_len=7)


@case
def head_dim_1(dtype: str) -> Problem:
    return problem(dtype, qk_dim=1)


@case
def head_dim_256(dtype: str) -> Problem:
    return problem(dtype, batch=(1, 1), qk_dim=256, q_len=70)


@case
def head_dim_7(dtype: str) -> Problem:
    """Sums of products are made in two parts, which are not alike."""
    return problem(dtype, qk_dim=7, v_dim=9)


@case
def head_dim_136(dtype: str) -> Problem:
    """In parts of 64, of which the last one is short."""
    return problem(dtype, batch=(1, 1), qk_dim=136, v_dim=3, q_len=20)


@case
def value_wider_than_key(dtype: str) -> Problem:
    return problem(dtype, qk_dim=16, v_dim=40)


@case
def value_narrower_than_key(dtype: str) -> Problem:
    return problem(dtype, qk_dim=48, v_dim=5)


@case
def cross_attention(dtype: str) -> Problem:
    return problem(dtype, q_len=19, kv_len=83)


@case
def grouped_query(dtype: str) -> Problem:
    return problem(dtype, batch=(2, 8), kv_batch=(2, 2), kv_index=(B0, op("floordiv", B1, 4)))


@case
def multi_query(dtype: str) -> Problem:
    return problem(dtype, batch=(2, 8), kv_batch=(2,), kv_index=(B0,))


@case
def shared_keys_and_own_values(dtype: str) -> Problem:
    """One key for all heads, a value for each."""
    base = problem(dtype, batch=(2, 3))
    key = base.operands[1][:, 0].contiguous()
    spec = replace(base.spec, key=load(key, 1, B0, K, D),
                   operands=(base.spec.operands[0], Operand(3, dtype), base.spec.operands[2]))  # fmt: skip
    return replace(base, spec=spec, operands=[base.operands[0], key, base.operands[2]])


@case
def heads_last_output(dtype: str) -> Problem:
    """The result lies as (batch, q, head, e), which is what an output projection reads."""
    return problem(dtype, out_order=(0, 2, 1, 3))


@case
def transposed_output(dtype: str) -> Problem:
    return problem(dtype, out_order=(3, 0, 1, 2), qk_dim=24)


@case
def heads_last_inputs(dtype: str) -> Problem:
    base = problem(dtype)
    return replace(base, operands=[t.transpose(1, 2).contiguous().transpose(1, 2) for t in base.operands])


@case
def features_strided(dtype: str) -> Problem:
    base = problem(dtype)
    return replace(base, operands=[t.mT.contiguous().mT for t in base.operands])


@case
def key_stored_transposed(dtype: str) -> Problem:
    base = problem(dtype)
    key = base.operands[1].mT.contiguous()
    spec = replace(base.spec, key=load(key, 1, B0, B1, D, K))
    return replace(base, spec=spec, operands=[base.operands[0], key, base.operands[2]])


def _flat(dtype: str, rows: Expr | int) -> Problem:
    """Batches one after the other, as what a linear layer of (batch * position, features) makes: ``rows`` apart."""
    base = problem(dtype)
    query, key, value = (t[:, 0].flatten(0, 1) for t in base.operands)
    place = op("mul", B0, rows)
    spec = replace(
        base.spec, operands=(Operand(2, dtype),) * 3, query=load(query, 0, op("add", Q, place), D),
        key=load(key, 1, op("add", K, place), D), value=load(value, 2, op("add", K, place), E),
    )  # fmt: skip
    return Problem(spec, [query, key, value], base.sizes)


@case
def flat_rows(dtype: str) -> Problem:
    return _flat(dtype, 37)


@case
def flat_rows_of_any_length(dtype: str) -> Problem:
    return _flat(dtype, Q_LEN)


@case
def views_of_vectors(dtype: str) -> Problem:
    """Rows one after the other in the query and the value, features in the key."""
    base = problem(dtype, batch=())
    width = base.spec.qk_dim
    places = [op("add", op("mul", Q, width), D), op("add", op("mul", D, KV_LEN), K), op("add", op("mul", K, width), E)]
    vectors = [base.operands[0].flatten(), base.operands[1].T.flatten(), base.operands[2].flatten()]
    parts = [load(t, i, at) for i, (t, at) in enumerate(zip(vectors, places, strict=True))]
    spec = replace(base.spec, operands=(Operand(1, dtype),) * 3, query=parts[0], key=parts[1], value=parts[2])
    return Problem(spec, vectors, base.sizes)


@case
def queries_on_a_diagonal(dtype: str) -> Problem:
    base = problem(dtype, batch=())
    query = rand(37, 37, 16, dtype=dtype)
    spec = replace(base.spec, operands=(Operand(3, dtype), *base.spec.operands[1:]), query=load(query, 0, Q, Q, D))
    return Problem(spec, [query, *base.operands[1:]], base.sizes)


@case
def heads_between_rows(dtype: str) -> Problem:
    """One vector of each position and head, (position * head, features), and of each head and feature one after the other."""
    base, heads = problem(dtype, batch=(3,)), 3
    queries, keys, values = base.operands
    place = {x: op("add", op("mul", x, heads), B0) for x in (Q, E)}
    query, value = queries.transpose(0, 1).flatten(0, 1), values.permute(1, 2, 0).flatten(1)
    spec = replace(base.spec, operands=(Operand(2, dtype), base.spec.operands[1], Operand(2, dtype)),
                   query=load(query, 0, place[Q], D), value=load(value, 2, K, place[E]))  # fmt: skip
    return Problem(spec, [query, keys, value], base.sizes)


@case
def one_query_and_one_key_without_their_indices(dtype: str) -> Problem:
    base = problem(dtype, q_len=1, kv_len=1, qk_dim=1)
    parts = [replace(x, coords=(B0, B1, const(0), const(0))) for x in (base.spec.query, base.spec.key, base.spec.value)]
    return replace(base, spec=replace(base.spec, query=parts[0], key=parts[1], value=parts[2]))


def _packed(dtype: str, width: int) -> Problem:
    """One projection's output [B, S, 3 * H * D] is query, key and value."""
    base, heads = problem(dtype, qk_dim=width), 3
    packed = rand(2, 37, 3 * heads * width, dtype=dtype)

    def part(number: int, position: Expr, feature: Expr) -> Load:
        column = op("add", op("mul", B1, width), number * heads * width)
        return load(packed, 0, B0, position, op("add", column, feature))

    spec = replace(base.spec, operands=(Operand(3, dtype),), query=part(0, Q, D), key=part(1, K, D), value=part(2, K, E))
    return Problem(spec, [packed], base.sizes)


@case
def packed_qkv(dtype: str) -> Problem:
    return _packed(dtype, 16)


@case
def packed_qkv_head_dim_24(dtype: str) -> Problem:
    """Beyond the features of a head lie those of the next one."""
    return _packed(dtype, 24)


# ------------------------------------------------------------------------------------------- biases and score programs


@case
def alibi(dtype: str) -> Problem:
    slope = torch.tensor([0.5, 0.25, 0.125], dtype=getattr(torch, dtype))
    distance = cast(op("sub", K, Q), dtype)
    return problem(dtype, slope, score=lambda s: causal_mask(op("add", s, op("mul", load(slope, 3, B1), distance))))


@case
def t5_bias(dtype: str) -> Problem:
    """A table [bucket, head], gathered by a bucket per (q, k)."""
    bucket, table = (torch.arange(37)[None] - torch.arange(37)[:, None]).clamp(-8, 8) + 8, rand(17, 3, dtype=dtype)
    bias = load(table, 4, load(bucket, 3, Q, K), B1)
    return problem(dtype, bucket, table, score=lambda s: op("add", s, bias))


@case
def relative_table(dtype: str) -> Problem:
    """A table [head, 2 * S - 1] read at k - q + S - 1."""
    table = rand(3, 73, dtype=dtype)
    place = op("add", op("sub", K, Q), op("sub", Q_LEN, 1))
    return problem(dtype, table, score=lambda s: op("add", s, load(table, 3, B1, place)))


@case
def decomposed_positions(dtype: str) -> Problem:
    """One bias for the key's row in a grid of 11 x 13, one for its column; pairs of rows that are tempered."""
    rows, columns = rand(1, 2, 13, 11, 11, dtype=dtype), rand(1, 2, 11, 13, 13, dtype=dtype)
    tempered = rand(11, 11) > 0
    (q_row, q_column), (k_row, k_column) = (
        (op("floordiv", i, const(13, "int64")), op("mod", i, const(13, "int64"))) for i in (Q, K)
    )

    def score(s: Expr) -> Expr:
        by_row, by_column = load(rows, 3, B0, B1, q_column, q_row, k_row), load(columns, 4, B0, B1, q_row, q_column, k_column)
        return op("add", op("add", op("where", load(tempered, 5, q_row, k_row), op("mul", s, 0.5), s), by_row), by_column)

    return problem(dtype, rows, columns, tempered, batch=(1, 2), q_len=143, score=score)


@case
def bias_that_is_scaled_too(dtype: str) -> Problem:
    bias = rand(37, 37, dtype=dtype)
    return problem(dtype, bias, score=lambda s: op("mul", op("add", s, load(bias, 3, Q, K)), 0.5))


@case
def soft_cap(dtype: str) -> Problem:
    """A third is not a number of any dtype."""
    return problem(dtype, score=lambda s: op("mul", op("tanh", op("div", s, 3.0)), 3.0))


@case
def soft_cap_causal(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: causal_mask(op("mul", op("tanh", op("div", s, 2.0)), 2.0)))


@case
def learned_scale_per_head(dtype: str) -> Problem:
    scale = rand(3, 1, 1, dtype=dtype)
    return problem(dtype, scale, score=lambda s: op("mul", s, load(scale, 3, B1, const(0), const(0))))


@case
def scalar_tensor_scale(dtype: str) -> Problem:
    scale = torch.tensor(0.7, dtype=getattr(torch, dtype))
    return problem(dtype, scale, score=lambda s: op("div", s, load(scale, 3)))


@case
def softmax_in_float32(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: cast(s, "float32") if dtype != "float64" else s)


@case
def score_before_and_after_cast(dtype: str) -> Problem:
    """The mask is added in ``dtype``, the soft-cap is in float32."""
    wide = "float64" if dtype == "float64" else "float32"
    return problem(dtype, score=lambda s: op("mul", op("tanh", cast(op("add", s, cast(op("le", K, Q), dtype)), wide)), 3.0))


# --------------------------------------------------------------------------------------------- normalisation and weight


@case
def sinks(dtype: str) -> Problem:
    sink = rand(3, dtype=dtype)
    return problem(dtype, sink, score=causal_mask, extra_logits=(load(sink, 3, B1),))


@case
def softmax_plus_one(dtype: str) -> Problem:
    return problem(dtype, extra_logits=(const(0.0, dtype),))


@case
def two_extra_logits(dtype: str) -> Problem:
    per_row = rand(2, 3, 37, dtype=dtype)
    return problem(dtype, per_row, extra_logits=(load(per_row, 3, B0, B1, Q), const(0.5, dtype)))


@case
def weight_factor(dtype: str) -> Problem:
    """A head mask after the softmax."""
    gate = rand(3, dtype=dtype)
    return problem(dtype, gate, weight=op("mul", Prob(dtype), load(gate, 3, B1)))


@case
def gate_and_bias_of_keys(dtype: str) -> Problem:
    """The bias's gradient sums over queries, of which a block may have less than lanes."""
    gate, bias = rand(37, 37, dtype=dtype), rand(37, dtype=dtype)
    weight = cast(op("mul", Prob(dtype), load(gate, 3, Q, K)), dtype)
    return problem(dtype, gate, bias, score=lambda s: op("add", s, load(bias, 4, K)), weight=weight)


@case
def weight_masked_after_softmax(dtype: str) -> Problem:
    """Rows that no longer sum to one."""
    weight = op("where", op("le", K, Q), Prob(dtype), const(0.0, dtype))
    return problem(dtype, weight=weight)


# --------------------------------------------------------------------------------------------------------------- dropout


def _dropped(prob: Expr, rate: float, seed: Tensor, plane: Expr, row: Expr = Q, column: Expr = K) -> Expr:
    """What F.dropout makes of the probabilities; operand 3 holds the seed."""
    number = expr.apply("uniform", load(seed, 3, const(0)), plane, row, column, dtype="float32")
    kept = op("lt", number, torch.tensor(1 - rate).item())
    return op("where", kept, op("div", prob, 1 - rate), const(0.0, prob.dtype))


SEED = torch.tensor([0x123456789ABCDEF])


@random_case
def dropout(dtype: str) -> Problem:
    plane = op("add", op("mul", B0, 3), B1)
    return problem(dtype, SEED, weight=cast(_dropped(Prob(dtype), 0.2, SEED, plane), dtype))


@random_case
def dropout_causal_two_tiles(dtype: str) -> Problem:
    plane = op("add", op("mul", B0, symbol("B1")), B1)
    weight = _dropped(Prob(dtype), 0.5, SEED, plane)
    return problem(dtype, SEED, batch=(1, 2), q_len=130, score=causal_mask, weight=cast(weight, dtype))


@random_case
def dropout_of_transposed_probabilities(dtype: str) -> Problem:
    return problem(dtype, SEED, weight=cast(_dropped(Prob(dtype), 0.1, SEED, B0, K, Q), dtype))
