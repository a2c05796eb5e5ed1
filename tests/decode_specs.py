"""Problems of few queries against many keys: DECODING maps a name to a function of the dtype, as specs.CASES does."""

from __future__ import annotations

from dataclasses import replace

import torch
from problems import B0, B1, B2, KV_LEN, LOWEST, Q_LEN, Case, K, Problem, Q, both, cast, hide, load, op, problem, rand

from fuse.ir.expr import Expr, const, symbol
from fuse.ir.spec import Mask

DECODING: dict[str, Case] = {}


def decoding(make: Case) -> Case:
    DECODING[make.__name__] = make
    return make


LAST = op("add", Q, op("sub", KV_LEN, Q_LEN))  # the newest key that a query sees


def with_cache(s: Expr) -> tuple[Expr, Mask]:
    return hide(s, op("le", K, LAST), upper=op("add", LAST, 1))


@decoding
def groups_of_8(dtype: str) -> Problem:
    """64 query heads, 8 of keys; causal with a cache."""
    return problem(dtype, batch=(2, 16), kv_batch=(2, 2), kv_index=(B0, op("floordiv", B1, 8)), q_len=1, kv_len=300,
                   qk_dim=32, score=with_cache)  # fmt: skip


@decoding
def groups_as_a_dimension(dtype: str) -> Problem:
    """Heads as (key head, member); two queries, of which the first does not see the last key."""
    return problem(dtype, batch=(2, 2, 3), kv_batch=(2, 2), kv_index=(B0, B1), q_len=2, kv_len=200, score=with_cache)


@decoding
def heads_71_to_1(dtype: str) -> Problem:
    return problem(dtype, batch=(1, 71), kv_batch=(1,), kv_index=(B0,), q_len=1, kv_len=270, score=with_cache)


@decoding
def last_group_is_smaller(dtype: str) -> Problem:
    slope = rand(7, dtype=dtype)
    return problem(dtype, slope, batch=(2, 7), kv_batch=(2, 3), kv_index=(B0, op("floordiv", B1, 3)), q_len=3, kv_len=90,
                   score=lambda s: op("add", s, load(slope, 3, B1)))  # fmt: skip


@decoding
def left_padding(dtype: str) -> Problem:
    keep = torch.arange(200) >= torch.tensor([[150], [0]])
    predicate = both(op("le", K, LAST), load(keep, 3, B0, K))
    return problem(
        dtype, keep, batch=(2, 4), kv_batch=(2,), kv_index=(B0,), q_len=1, kv_len=200,
        score=lambda s: hide(s, predicate, LOWEST[dtype], upper=op("add", LAST, 1), residual=load(keep, 3, B0, K)),
    )  # fmt: skip


@decoding
def row_of_padding_averages(dtype: str) -> Problem:
    """The first of the batch sees nothing: eager's finite fill gives it the mean of all values."""
    keep = torch.arange(200) >= torch.tensor([[200], [0]])
    return problem(dtype, keep, q_len=1, kv_len=200, score=lambda s: hide(s, load(keep, 3, B0, K), LOWEST[dtype]))


@decoding
def window_of_a_long_cache(dtype: str) -> Problem:
    first = op("add", op("sub", LAST, symbol("window")), 1)
    predicate = both(op("le", K, LAST), op("ge", K, first))
    return problem(dtype, q_len=1, kv_len=500, symbols={"window": 130},
                   score=lambda s: hide(s, predicate, lower=first, upper=op("add", LAST, 1)))  # fmt: skip


@decoding
def one_query_of_each_sequence(dtype: str) -> Problem:
    """Packed: the second has no keys, and the bounds are read from tables."""
    first, end = torch.tensor([0, 90, 90, 210]), torch.tensor([70, 90, 210, 260])
    bounds = [load(x, i, Q) for i, x in ((3, first), (4, end))]
    predicate = both(op("le", bounds[0], K), op("lt", K, bounds[1]))
    return problem(dtype, first, end, batch=(1, 8), kv_batch=(1, 2), kv_index=(B0, op("floordiv", B1, 4)), q_len=4, kv_len=270,
                   score=lambda s: hide(s, predicate, lower=bounds[0], upper=bounds[1]))  # fmt: skip


@decoding
def sinks_beside_groups(dtype: str) -> Problem:
    sink = rand(8, dtype=dtype)
    return problem(dtype, sink, batch=(2, 8), kv_batch=(2, 2), kv_index=(B0, op("floordiv", B1, 4)), q_len=1, kv_len=200,
                   score=with_cache, extra_logits=(load(sink, 3, B1),))  # fmt: skip


@decoding
def static_cache(dtype: str) -> Problem:
    """A mask of the whole cache, of which little is used, one for all heads."""
    keep = (torch.arange(512) < 140)[None, None]
    return problem(dtype, keep, batch=(2, 8), kv_batch=(2, 2), kv_index=(B0, op("floordiv", B1, 4)), q_len=1, kv_len=512,
                   score=lambda s: hide(s, load(keep, 3, const(0), const(0), K)))  # fmt: skip


@decoding
def member_bias(dtype: str) -> Problem:
    """A dense bias of every query head, whose group has but one key head."""
    bias = rand(2, 2, 3, 2, 150, dtype=dtype)
    return problem(dtype, bias, batch=(2, 2, 3), kv_batch=(2, 2), kv_index=(B0, B1), q_len=2, kv_len=150,
                   score=lambda s: op("add", s, load(bias, 3, B0, B1, B2, Q, K)))  # fmt: skip


@decoding
def scores_that_grow_along_the_cache(dtype: str) -> Problem:
    """Each tile of keys has a larger score than all before it."""
    made = problem(dtype, q_len=2, kv_len=330)
    query, key, value = made.operands
    return replace(made, operands=[query, key * torch.linspace(0.1, 3, 330)[:, None].to(key), value])


@decoding
def values_with_strided_features(dtype: str) -> Problem:
    """A key that may be read where it lies beside a value that may not."""
    base = problem(dtype, batch=(2, 4), q_len=1, kv_len=90, v_dim=24)
    return replace(base, operands=[*base.operands[:2], base.operands[2].mT.contiguous().mT])


@decoding
def no_keys_yet(dtype: str) -> Problem:
    return problem(dtype, q_len=1, kv_len=0, score=with_cache)


@decoding
def low_sinks_beside_rows_of_padding(dtype: str) -> Problem:
    """The first of the batch sees nothing but its sink."""
    keep, sink = torch.arange(90) >= torch.tensor([[90], [0]]), torch.tensor([-100.0, -3000.0], dtype=getattr(torch, dtype))
    return problem(dtype, keep, sink, batch=(2, 2), q_len=1, kv_len=90, score=lambda s: hide(s, load(keep, 3, B0, K)),
                   extra_logits=(load(sink, 4, B1),))  # fmt: skip


@decoding
def cache_by_positions_in_bfloat16(dtype: str) -> Problem:
    """The newest key, 301, is as good as the two before it."""
    predicate = op("ge", cast(K, "bfloat16"), cast(LAST, "bfloat16"))
    return problem(dtype, q_len=1, kv_len=302, score=lambda s: hide(s, predicate))
