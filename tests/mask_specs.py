"""Named problems with masks of every class, and rows without a visible key."""

from __future__ import annotations

import math

import torch
from problems import (
    B0,
    B1,
    KV_LEN,
    LOWEST,
    Q_LEN,
    K,
    Problem,
    Q,
    both,
    case,
    cast,
    causal_mask,
    hide,
    load,
    mapped,
    op,
    problem,
    rand,
)

from fuse.ir.expr import K_START, LENGTH, Q_START, Expr, const, symbol
from fuse.ir.spec import Mask

# ------------------------------------------------------------------------------------------------------------- masks


@case
def causal(dtype: str) -> Problem:
    return problem(dtype, score=causal_mask)


@case
def causal_without_mask_knowledge(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: causal_mask(s)[0])


@case
def causal_long(dtype: str) -> Problem:
    return problem(dtype, batch=(1, 2), q_len=515, qk_dim=32, score=causal_mask)


@case
def causal_finite_fill(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: hide(s, op("le", K, Q), LOWEST[dtype], upper=op("add", Q, 1)))


@case
def causal_offset(dtype: str) -> Problem:
    """The last query sees every key, as with a cache."""
    last = op("add", Q, op("sub", KV_LEN, Q_LEN))
    return problem(dtype, q_len=21, kv_len=90, score=lambda s: hide(s, op("le", K, last), upper=op("add", last, 1)))


@case
def causal_more_queries_than_keys(dtype: str) -> Problem:
    """The first q_len - kv_len rows see nothing."""
    last = op("add", Q, op("sub", KV_LEN, Q_LEN))
    return problem(
        dtype, q_len=60, kv_len=40, empty_row="zero", score=lambda s: hide(s, op("le", K, last), upper=op("add", last, 1))
    )


@case
def window(dtype: str) -> Problem:
    """Sliding window of a run-time size."""
    first = op("add", op("sub", Q, symbol("window")), 1)
    predicate = both(op("le", K, Q), op("ge", K, first))
    return problem(
        dtype, batch=(1, 2), q_len=300, symbols={"window": 50},
        score=lambda s: hide(s, predicate, lower=first, upper=op("add", Q, 1)),
    )  # fmt: skip


@case
def shard_of_a_window(dtype: str) -> Problem:
    """Queries and keys are parts of a sequence, as where it lies on several ranks: the first ten queries see no key, and the
    last ten, which look further on, neither."""
    q, k = op("add", Q, symbol(Q_START)), op("add", K, symbol(K_START))
    first = op("sub", op("add", op("sub", q, 80), 1), symbol(K_START))
    upper = op("sub", op("add", q, 1), symbol(K_START))
    predicate = both(op("le", k, q), op("ge", k, op("add", op("sub", q, 80), 1)))
    return problem(
        dtype, batch=(1, 2), q_len=160, kv_len=61, symbols={Q_START: 310, K_START: 320, LENGTH: 1000}, empty_row="zero",
        score=lambda s: hide(s, predicate, lower=first, upper=upper),
    )  # fmt: skip


@case
def prefix(dtype: str) -> Problem:
    """Causal, with a prefix that everything sees, its length given per batch."""
    length = torch.tensor([5, 40])
    seen = op("lt", K, load(length, 3, B0))
    predicate = op("or", op("le", K, Q), seen)
    return problem(dtype, length, score=lambda s: hide(s, predicate))


@case
def dilated(dtype: str) -> Problem:
    predicate = both(op("le", K, Q), op("eq", op("mod", op("sub", Q, K), 3), 0))
    return problem(
        dtype, score=lambda s: hide(s, predicate, upper=op("add", Q, 1), residual=op("eq", op("mod", op("sub", Q, K), 3), 0))
    )


@case
def padding(dtype: str) -> Problem:
    """A bool per batch and key."""
    keep = torch.arange(130) < torch.tensor([[40], [130]])
    return problem(dtype, keep, q_len=20, kv_len=130, score=lambda s: hide(s, load(keep, 3, B0, K)))


@case
def left_padding_and_causal(dtype: str) -> Problem:
    """Padded queries see nothing; the fill is finite, so they average."""
    keep = torch.arange(70) >= torch.tensor([[30], [0]])
    predicate = both(op("le", K, Q), load(keep, 3, B0, K))
    return problem(
        dtype, keep, q_len=70,
        score=lambda s: hide(s, predicate, LOWEST[dtype], upper=op("add", Q, 1), residual=load(keep, 3, B0, K)),
    )  # fmt: skip


@case
def documents(dtype: str) -> Problem:
    ids = torch.arange(100).div(23, rounding_mode="floor").expand(2, 100)
    predicate = both(op("le", K, Q), op("eq", load(ids, 3, B0, Q), load(ids, 3, B0, K)))
    return problem(dtype, ids, q_len=100, score=lambda s: hide(s, predicate))


ENDS = torch.tensor([0, 40, 190, 191, 203])
PACKED = [ENDS[i : i + 4].repeat_interleave(ENDS.diff()) for i in (0, 1)]


def in_sequence(s: Expr) -> tuple[Expr, Mask]:
    first, end = load(PACKED[0], 3, Q), load(PACKED[1], 4, Q)
    return hide(s, both(op("le", first, K), op("lt", K, end)), lower=first, upper=end)


@case
def packed_sequences(dtype: str) -> Problem:
    """Of 40, 150, 1 and 12 tokens: bounds are read from tables."""
    return problem(dtype, *PACKED, batch=(1, 2), q_len=203, score=in_sequence)


@case
def packed_sequences_without_every_seventh_key(dtype: str) -> Problem:
    def score(s: Expr) -> tuple[Expr, Mask]:
        _, whole = in_sequence(s)
        dilated = op("ne", op("mod", K, 7), 0)
        return hide(s, both(whole.predicate, dilated), lower=whole.lower, upper=whole.upper, residual=dilated)

    return problem(dtype, *PACKED, batch=(1, 2), q_len=203, score=score)


@case
def dense_bool(dtype: str) -> Problem:
    keep = rand(2, 1, 37, 37) > -0.5
    return problem(dtype, keep, score=lambda s: hide(s, load(keep, 3, B0, const(0), Q, K)))


@case
def documents_in_any_order(dtype: str) -> Problem:
    """Longer than tiles; half of the sequence is sorted."""
    unsorted = torch.randint(5, (140,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat((torch.arange(200) // 70, unsorted)).expand(2, 340)
    return problem(
        dtype, ids, batch=(2, 2), q_len=340, score=lambda s: hide(s, op("eq", load(ids, 3, B0, Q), load(ids, 3, B0, K)))
    )


@case
def block_diagonal_or_first_keys(dtype: str) -> Problem:
    same = op("eq", op("floordiv", Q, 90), op("floordiv", K, 90))
    return problem(dtype, batch=(1, 2), q_len=300, score=lambda s: hide(s, op("or", same, op("lt", K, 3))))


@case
def listed_blocks(dtype: str) -> Problem:
    """A BlockMask of 128 queries × 130 keys: blocks of class 2 are seen whatever the mask says, those of 0 are not at all."""
    classes = torch.tensor([[2, 0, 1], [1, 1, 2], [0, 1, 1]], dtype=torch.uint8)
    found = cast(load(classes, 3, op("floordiv", Q, 128), op("floordiv", K, 130)), "int64")
    seen = op("or", op("eq", found, 2), both(op("eq", found, 1), op("le", K, Q)))
    return problem(dtype, classes, batch=(1, 2), q_len=300, score=lambda s: hide(s, seen))


@case
def mapped_bool(dtype: str) -> Problem:
    """A map of tiles, one for all heads; some rows see nothing."""
    keep = torch.ones(2, 300, 300, dtype=torch.bool).tril()
    keep[0, 100:140], keep[1, :, 64:128], keep[1, 290, 200:] = False, False, True
    return mapped(problem(dtype, keep, batch=(2, 2), q_len=300, score=lambda s: hide(s, load(keep, 3, B0, Q, K))))


@case
def mapped_bool_with_lowest_fill_below_the_diagonal(dtype: str) -> Problem:
    keep = rand(300, 300) > 2
    predicate = both(op("le", K, Q), load(keep, 3, Q, K))
    return mapped(
        problem(
            dtype, keep, batch=(1, 2), q_len=300,
            score=lambda s: hide(s, predicate, LOWEST[dtype], upper=op("add", Q, 1), residual=load(keep, 3, Q, K)),
        )
    )  # fmt: skip


@case
def dense_additive(dtype: str) -> Problem:
    bias = rand(2, 1, 37, 37, dtype=dtype).masked_fill(rand(37, 37) > 1, -math.inf)
    return problem(dtype, bias, score=lambda s: op("add", s, load(bias, 3, B0, const(0), Q, K)))


@case
def integer_mask_product(dtype: str) -> Problem:
    """GPT-2 before 2020: s * b - 1e4 * (1 - b)."""
    keep = torch.ones(37, 37).tril().to(getattr(torch, dtype))
    b = load(keep, 3, Q, K)
    return problem(dtype, keep, score=lambda s: op("sub", op("mul", s, b), op("mul", op("sub", 1, b), 1e4)))


# ------------------------------------------------------------------------------------------------- fully masked rows

_NO_ROW_3 = op("ne", Q, 3)


@case
def masked_rows_infinite_fill(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: hide(s, _NO_ROW_3))


@case
def masked_rows_lowest_fill(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: hide(s, _NO_ROW_3, LOWEST[dtype]))


@case
def masked_rows_soft_fill(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: hide(s, _NO_ROW_3, -1e4))


@case
def masked_rows_added_fill(dtype: str) -> Problem:
    """Added, not filled in: how such a row comes out depends on the rounding of -1e4 + s."""
    penalty = op("where", _NO_ROW_3, const(0.0, dtype), const(-1e4, dtype))
    return problem(dtype, score=lambda s: op("add", s, penalty))


@case
def row_of_a_low_bias(dtype: str) -> Problem:
    """No mask is known, and a row's log-sum-exp has lost the digits that its probabilities need."""
    bias = rand(37, 37, dtype=dtype).index_fill(0, torch.tensor([3]), -3e4)
    return problem(dtype, bias, score=lambda s: op("add", s, load(bias, 3, Q, K)))


@case
def masked_rows_are_zero(dtype: str) -> Problem:
    return problem(dtype, empty_row="zero", score=lambda s: hide(s, _NO_ROW_3))


@case
def two_lowest_masks_overflow(dtype: str) -> Problem:
    """finfo.min twice is -inf: a row masked by both is NaN."""
    first, second = (op("where", p, const(0.0, dtype), const(LOWEST[dtype], dtype)) for p in (_NO_ROW_3, op("lt", Q, 5)))
    return problem(dtype, score=lambda s: op("add", op("add", first, second), s))


@case
def raised_to_the_largest_number(dtype: str) -> Problem:
    """A negated mask: where it is, the scores are one number as large as there is, and so is the row's log-sum-exp."""
    raised = op("where", op("eq", op("mod", K, 5), 0), const(-LOWEST[dtype], dtype), const(0.0, dtype))
    return problem(dtype, score=lambda s: op("add", raised, s))


@case
def masked_rows_with_sink(dtype: str) -> Problem:
    """Whatever is masked, the sink keeps the row finite."""
    sink = rand(3, dtype=dtype)
    return problem(dtype, sink, score=lambda s: hide(s, _NO_ROW_3), extra_logits=(load(sink, 3, B1),))


@case
def masked_rows_with_low_sinks(dtype: str) -> Problem:
    """exp of their distance from nothing at all overflows; a sink of -inf leaves such a row NaN."""
    sink = torch.tensor([-100.0, -3000.0, -math.inf], dtype=getattr(torch, dtype))
    return problem(dtype, sink, score=lambda s: hide(s, _NO_ROW_3), extra_logits=(load(sink, 3, B1),))


@case
def masked_rows_with_two_low_sinks(dtype: str) -> Problem:
    sink = torch.tensor([-100.0, -3000.0, -math.inf], dtype=getattr(torch, dtype))
    return problem(dtype, sink, score=lambda s: hide(s, _NO_ROW_3), extra_logits=(load(sink, 3, B1), const(-200.0, dtype)))


@case
def no_keys_under_a_lowest_fill(dtype: str) -> Problem:
    return problem(dtype, kv_len=0, score=lambda s: hide(s, op("le", K, Q), LOWEST[dtype], upper=op("add", Q, 1)))


@case
def no_keys_beside_a_low_sink(dtype: str) -> Problem:
    sink = torch.tensor([-100.0, -3000.0, 1.0], dtype=getattr(torch, dtype))
    return problem(dtype, sink, kv_len=0, score=causal_mask, extra_logits=(load(sink, 3, B1),))


@case
def no_keys_in_a_mapped_mask(dtype: str) -> Problem:
    keep = torch.ones(70, 0, dtype=torch.bool)
    return mapped(problem(dtype, keep, q_len=70, kv_len=0, score=lambda s: hide(s, load(keep, 3, Q, K))))
