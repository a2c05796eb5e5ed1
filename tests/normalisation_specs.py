"""Problems without a softmax: what multiplies the values is a function of the score, or that divided by its sum."""

from __future__ import annotations

import torch
from problems import B0, B1, K, Problem, Q, both, case, cast, hide, load, op, problem, rand

from fuse.ir.expr import Expr, Prob, const
from fuse.ir.spec import Mask


def _causal(s: Expr) -> tuple[Expr, Mask]:
    return hide(s, op("le", K, Q), 0.0, upper=op("add", Q, 1))


def _positive(s: Expr) -> Expr:
    return op("add", op("mul", op("sigmoid", s), 0.9), 0.1)


def _decayed(s: Expr) -> Expr:
    """Retention (Sun et al. 2023, arXiv:2307.08621, equation 5): infinite where the mask hides it, if far enough."""
    return op("mul", s, op("pow", const(0.01, s.dtype), cast(op("sub", Q, K), s.dtype)))


@case
def sigmoid_attention(dtype: str) -> Problem:
    """Ramapuram et al. 2024, arXiv:2409.04431, equation 2."""
    return problem(dtype, score=lambda s: op("sigmoid", op("sub", s, 3.6)), normalisation="none")


@case
def squared_relu_causal(dtype: str) -> Problem:
    return problem(
        dtype, q_len=150, score=lambda s: _causal(op("mul", op("pow", op("maximum", s, 0.0), 2), 0.25)), normalisation="none"
    )


@case
def retention(dtype: str) -> Problem:
    return problem(dtype, q_len=133, batch=(1, 2), score=lambda s: _causal(_decayed(s)), normalisation="none")


@case
def retention_of_learned_decay(dtype: str) -> Problem:
    rate = (rand(3, dtype=dtype) * 0.1 + 0.5).to(getattr(torch, dtype))

    def score(s: Expr) -> tuple[Expr, Mask]:
        return _causal(op("mul", s, op("pow", load(rate, 3, B1), cast(op("sub", Q, K), dtype))))

    return problem(dtype, rate, q_len=70, score=score, normalisation="none")


@case
def linear_attention_causal(dtype: str) -> Problem:
    """Katharopoulos et al. 2020, arXiv:2006.16236, equation 4, of features that are positive."""
    return problem(dtype, q_len=140, score=lambda s: _causal(_positive(s)), normalisation="sum")


@case
def divided_by_its_sum(dtype: str) -> Problem:
    return problem(dtype, q_len=5, kv_len=300, score=_positive, normalisation="sum")


@case
def small_weights_divided_by_themselves(dtype: str) -> Problem:
    """Of about 1e-6, of which float16 has one digit; what is divided by them has all of them."""
    return problem(dtype, q_len=1, normalisation="sum", score=lambda s: op("sigmoid", op("sub", s, 14.0)))


@case
def small_weights_in_float64_divided_by_themselves(dtype: str) -> Problem:
    return problem(dtype, q_len=1, normalisation="sum", score=lambda s: op("sigmoid", op("sub", cast(s, "float64"), 14.0)))


@case
def window_without_a_softmax(dtype: str) -> Problem:
    seen = both(op("le", K, Q), op("lt", op("sub", Q, K), 9))
    lower, upper = op("sub", Q, 8), op("add", Q, 1)
    return problem(
        dtype, q_len=300, batch=(1, 2), normalisation="none",
        score=lambda s: hide(op("sigmoid", s), seen, 0.0, lower=lower, upper=upper),
    )  # fmt: skip


@case
def padding_without_a_softmax(dtype: str) -> Problem:
    """No bounds: what is hidden is data, of some rows everything."""
    seen = torch.arange(67)[None] < torch.tensor([50, 0])[:, None]
    return problem(dtype, seen, q_len=67, score=lambda s: hide(s, load(seen, 3, B0, K), 0.0), normalisation="none")


@case
def biased_without_a_softmax(dtype: str) -> Problem:
    """Bias of each entry and gate of each row, grouped queries."""
    bias, gate = rand(3, 45, 45, dtype=dtype), rand(2, 3, 45, dtype=dtype, seed=4)

    def score(s: Expr) -> Expr:
        return op("mul", op("sigmoid", op("add", s, load(bias, 3, B1, Q, K))), load(gate, 4, B0, B1, Q))

    return problem(dtype, bias, gate, q_len=45, kv_batch=(2,), kv_index=[B0], score=score, normalisation="none")


@case
def groups_without_a_softmax(dtype: str) -> Problem:
    kv_index = (B0, op("floordiv", B1, 4))
    return problem(
        dtype, batch=(2, 8), kv_batch=(2, 2), kv_index=kv_index, score=lambda s: op("sigmoid", s), normalisation="none"
    )


@case
def weight_without_a_softmax(dtype: str) -> Problem:
    """Something else than the probability multiplies the values."""
    kept = op("where", op("eq", op("mod", op("add", Q, K), 3), 0), const(0.0, dtype), op("mul", Prob(dtype), 1.5))
    return problem(dtype, q_len=50, score=_positive, weight=kept, normalisation="sum")


@case
def no_keys_without_a_softmax(dtype: str) -> Problem:
    return problem(dtype, kv_len=0, normalisation="none")


@case
def decoding_without_a_softmax(dtype: str) -> Problem:
    return problem(dtype, q_len=1, kv_len=700, score=lambda s: op("sigmoid", s), normalisation="none")


@case
def decoding_divided_by_its_sum(dtype: str) -> Problem:
    return problem(dtype, q_len=2, kv_len=700, score=_positive, normalisation="sum")
