"""Named attention problems that every target must solve: CASES maps a name to a function of the dtype.

problem = CASES["causal"]("bfloat16")
problem.check(kernel(problem.operands, problem.sizes))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuse import expr, reference, tiles
from fuse.expr import COMPARISONS, Expr, Load, Prob, Score, const, index, symbol
from fuse.spec import AttentionSpec, Mask, Operand, verify

B0, B1, B2, Q, K, D, E = (index(axis) for axis in ("b0", "b1", "b2", "q", "k", "d", "e"))
Q_LEN, KV_LEN = symbol("q_len"), symbol("kv_len")

Number = float | int | bool


def op(name: str, *args: Expr | Number) -> Expr:
    """A node; numbers and the result take the dtype of the last operand that is an expression."""
    dtype = next(a.dtype for a in reversed(args) if isinstance(a, Expr))
    nodes = [a if isinstance(a, Expr) else const(a, dtype) for a in args]
    return expr.apply(name, *nodes, dtype="bool" if name in COMPARISONS else dtype)


def cast(node: Expr, dtype: str) -> Expr:
    return expr.apply("cast", node, dtype=dtype)


def load(tensor: Tensor, operand: int, *coords: Expr) -> Load:
    return Load(dtype_name(tensor), operand, coords)


def both(*predicates: Expr) -> Expr:
    result = predicates[0]
    for predicate in predicates[1:]:
        result = op("and", result, predicate)
    return result


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def rand(*shape: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(getattr(torch, dtype))


@dataclass(frozen=True)
class Problem:
    """A spec with data to run it on."""

    spec: AttentionSpec
    operands: list[Tensor]
    sizes: list[int]

    def check(self, out: Tensor) -> None:
        """Fails unless ``out`` has the promised layout and is about as close to float64 as eager is."""
        assert out.shape == self.spec.out_shape(self.sizes)
        assert out.stride() == self.spec.out_strides(self.sizes) or out.numel() == 0
        assert dtype_name(out) == self.spec.out_dtype
        exact = reference.attention(self.spec, self.operands, self.sizes)
        eager = reference.attention(self.spec, self.operands, self.sizes, "eager").double()
        assert torch.equal(out.isnan(), eager.isnan()), "NaN where eager has none, or none where eager has NaN"
        if out.numel():
            # a row that is masked with -1e9 averages in float32, and in float64 does not: eager's own error allows for it
            allowed = 2 * (eager - exact).nan_to_num().abs().amax() + 8 * torch.finfo(out.dtype).eps
            error = (out.double() - exact).nan_to_num().abs().amax()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def problem(
    dtype: str,
    *extra: Tensor,
    batch: tuple[int, ...] = (2, 3),
    q_len: int = 37,
    kv_len: int | None = None,
    qk_dim: int = 16,
    v_dim: int | None = None,
    kv_batch: tuple[int, ...] | None = None,
    kv_index: Sequence[Expr] | None = None,
    score: Callable[[Expr], Expr | tuple[Expr, Mask]] = lambda s: s,
    extra_logits: tuple[Expr, ...] = (),
    weight: Expr | None = None,
    empty_row: str = "nan",
    out_order: tuple[int, ...] | None = None,
    symbols: dict[str, int] | None = None,
) -> Problem:
    """Query (batch, q, d), key (kv_batch, k, d), value (kv_batch, k, e) as operands 0, 1, 2, then ``extra``.

    ``score`` makes the score, or the score and the mask, from Score times 1/sqrt(qk_dim) in ``dtype``.
    """
    kv_len, v_dim, symbols = q_len if kv_len is None else kv_len, v_dim or qk_dim, symbols or {}
    kv_batch = batch if kv_batch is None else kv_batch
    indices = [index(f"b{i}") for i in range(len(batch))]
    kv_index = indices if kv_index is None else kv_index
    query = rand(*batch, q_len, qk_dim, dtype=dtype, seed=1)
    key, value = (rand(*kv_batch, kv_len, width, dtype=dtype, seed=s) for s, width in ((2, qk_dim), (3, v_dim)))
    made = score(op("mul", Score(dtype), qk_dim**-0.5))
    program, mask = made if isinstance(made, tuple) else (made, None)
    tensors = [query, key, value, *extra]
    spec = AttentionSpec(
        batch=len(batch), qk_dim=qk_dim, v_dim=v_dim, operands=tuple(Operand(t.dim(), dtype_name(t)) for t in tensors),
        query=load(query, 0, *indices, Q, D), key=load(key, 1, *kv_index, K, D), value=load(value, 2, *kv_index, K, E),
        score=program, mask=mask, extra_logits=extra_logits, weight=weight or cast(Prob(program.dtype), dtype),
        empty_row=empty_row, out_dtype=dtype, out_order=out_order or tuple(range(len(batch) + 2)), extra=tuple(symbols),
    )  # fmt: skip
    verify(spec)
    return Problem(spec, tensors, [*batch, q_len, kv_len, *symbols.values()])


def hide(
    s: Expr, predicate: Expr, fill: float = -math.inf,
    lower: Expr | None = None, upper: Expr | None = None, residual: Expr | None = None,
) -> tuple[Expr, Mask]:  # fmt: skip
    """``s`` with ``fill`` where ``predicate`` is false, and what is known about it; by default no loop bounds."""
    bounded = lower is not None or upper is not None
    residual = residual if bounded else predicate
    return op("where", predicate, s, const(fill, s.dtype)), Mask(predicate, s, lower, upper, residual, fill)


def mapped(made: Problem) -> Problem:
    """With a map of the residual's tiles as last operand."""
    use, mask = tiles.map_of(made.spec), made.spec.mask
    assert use is not None and mask is not None
    sizes = dict(zip(made.spec.symbols, made.sizes, strict=True))
    cells = reference.tile_map(use.tile_map, [made.operands[i] for i in use.operands], [sizes[n] for n in use.symbols])
    operands = (*made.spec.operands, Operand(cells.dim(), "uint8"))
    spec = replace(made.spec, mask=replace(mask, tiles=use.load), operands=operands)
    verify(spec)
    return Problem(spec, [*made.operands, cells], made.sizes)


Case = Callable[[str], Problem]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__] = make
    return make


LOWEST = {name: torch.finfo(getattr(torch, name)).min for name in expr.FLOATS}

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


@case
def packed_qkv(dtype: str) -> Problem:
    """One projection's output [B, S, 3 * H * D] is query, key and value."""
    base, heads, width = problem(dtype), 3, 16
    packed = rand(2, 37, 3 * heads * width, dtype=dtype)

    def part(number: int, position: Expr, feature: Expr) -> Load:
        column = op("add", op("mul", B1, width), number * heads * width)
        return load(packed, 0, B0, position, op("add", column, feature))

    spec = replace(base.spec, operands=(Operand(3, dtype),), query=part(0, Q, D), key=part(1, K, D), value=part(2, K, E))
    return Problem(spec, [packed], base.sizes)


# ------------------------------------------------------------------------------------------------------------- masks


def _causal(s: Expr) -> tuple[Expr, Mask]:
    return hide(s, op("le", K, Q), upper=op("add", Q, 1))


@case
def causal(dtype: str) -> Problem:
    return problem(dtype, score=_causal)


@case
def causal_without_mask_knowledge(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: _causal(s)[0])


@case
def causal_long(dtype: str) -> Problem:
    return problem(dtype, batch=(1, 2), q_len=515, qk_dim=32, score=_causal)


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


@case
def dense_bool(dtype: str) -> Problem:
    keep = rand(2, 1, 37, 37) > -0.5
    return problem(dtype, keep, score=lambda s: hide(s, load(keep, 3, B0, const(0), Q, K)))


@case
def documents_in_any_order(dtype: str) -> Problem:
    """Longer than tiles; half of the sequence is sorted."""
    ids = torch.cat((torch.arange(300) // 70, torch.randint(5, (200,), generator=torch.Generator().manual_seed(0)))).expand(
        2, 500
    )
    return problem(dtype, ids, q_len=500, score=lambda s: hide(s, op("eq", load(ids, 3, B0, Q), load(ids, 3, B0, K))))


@case
def block_diagonal_or_first_keys(dtype: str) -> Problem:
    same = op("eq", op("floordiv", Q, 90), op("floordiv", K, 90))
    return problem(dtype, q_len=400, score=lambda s: hide(s, op("or", same, op("lt", K, 3))))


@case
def mapped_bool(dtype: str) -> Problem:
    """A map of tiles, one for all heads; some rows see nothing."""
    keep = torch.ones(2, 300, 300, dtype=torch.bool).tril()
    keep[0, 100:140], keep[1, :, 64:128], keep[1, 290, 200:] = False, False, True
    return mapped(problem(dtype, keep, q_len=300, score=lambda s: hide(s, load(keep, 3, B0, Q, K))))


@case
def mapped_bool_with_lowest_fill_below_the_diagonal(dtype: str) -> Problem:
    keep = rand(300, 300) > 2
    predicate = both(op("le", K, Q), load(keep, 3, Q, K))
    return mapped(
        problem(
            dtype, keep, q_len=300,
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
def masked_rows_are_zero(dtype: str) -> Problem:
    return problem(dtype, empty_row="zero", score=lambda s: hide(s, _NO_ROW_3))


@case
def two_lowest_masks_overflow(dtype: str) -> Problem:
    """finfo.min twice is -inf: a row masked by both is NaN."""
    first, second = (op("where", p, const(0.0, dtype), const(LOWEST[dtype], dtype)) for p in (_NO_ROW_3, op("lt", Q, 5)))
    return problem(dtype, score=lambda s: op("add", op("add", first, second), s))


@case
def masked_rows_with_sink(dtype: str) -> Problem:
    """Whatever is masked, the sink keeps the row finite."""
    sink = rand(3, dtype=dtype)
    return problem(dtype, sink, score=lambda s: hide(s, _NO_ROW_3), extra_logits=(load(sink, 3, B1),))


# ------------------------------------------------------------------------------------------- biases and score programs


@case
def alibi(dtype: str) -> Problem:
    slope = torch.tensor([0.5, 0.25, 0.125], dtype=getattr(torch, dtype))
    distance = cast(op("sub", K, Q), dtype)
    return problem(dtype, slope, score=lambda s: _causal(op("add", s, op("mul", load(slope, 3, B1), distance))))


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
def soft_cap(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: op("mul", op("tanh", op("div", s, 2.0)), 2.0))


@case
def soft_cap_causal(dtype: str) -> Problem:
    return problem(dtype, score=lambda s: _causal(op("mul", op("tanh", op("div", s, 2.0)), 2.0)))


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
    return problem(dtype, sink, score=_causal, extra_logits=(load(sink, 3, B1),))


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
def weight_masked_after_softmax(dtype: str) -> Problem:
    """Rows that no longer sum to one."""
    weight = op("where", op("le", K, Q), Prob(dtype), const(0.0, dtype))
    return problem(dtype, weight=weight)


# --------------------------------------------------------------------------------------------------------------- dropout

RANDOM_CASES: dict[str, Case] = {}


def _dropped(prob: Expr, rate: float, seed: Tensor, plane: Expr, row: Expr = Q, column: Expr = K) -> Expr:
    """What F.dropout makes of the probabilities; operand 3 holds the seed."""
    number = expr.apply("uniform", load(seed, 3, const(0)), plane, row, column, dtype="float32")
    kept = op("lt", number, torch.tensor(1 - rate).item())
    return op("where", kept, op("div", prob, 1 - rate), const(0.0, prob.dtype))


def random_case(make: Case) -> Case:
    RANDOM_CASES[make.__name__] = make
    return make


SEED = torch.tensor([0x123456789ABCDEF])


@random_case
def dropout(dtype: str) -> Problem:
    plane = op("add", op("mul", B0, 3), B1)
    return problem(dtype, SEED, weight=cast(_dropped(Prob(dtype), 0.2, SEED, plane), dtype))


@random_case
def dropout_causal_two_tiles(dtype: str) -> Problem:
    plane = op("add", op("mul", B0, symbol("B1")), B1)
    weight = _dropped(Prob(dtype), 0.5, SEED, plane)
    return problem(dtype, SEED, batch=(1, 2), q_len=197, score=_causal, weight=cast(weight, dtype))


@random_case
def dropout_of_transposed_probabilities(dtype: str) -> Problem:
    return problem(dtype, SEED, weight=cast(_dropped(Prob(dtype), 0.1, SEED, B0, K, Q), dtype))
