"""The oracle itself is checked against PyTorch's own attention and against formulas written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import B0, K, Problem, Q, load, op, own_products, problem
from specs import CASES, RANDOM_CASES
from torch import Tensor

from fuse.ir import philox
from fuse.ir.expr import FLOATS, const
from fuse.ir.spec import InvalidSpec, Mask
from fuse.targets import reference


def oracle(made: Problem) -> Tensor:
    return reference.attention(made.spec, made.operands, made.sizes)


def exact(name: str) -> tuple[Tensor, list[Tensor]]:
    """The oracle's result for a case in float32, and its operands in float64."""
    made = CASES[name]("float32")
    widen = [t.double() if t.is_floating_point() else t for t in made.operands]
    return oracle(made), widen


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_eager_precision_solves_every_case(name: str, dtype: str) -> None:
    made = CASES[name](dtype)
    with own_products():
        made.check(reference.attention(made.spec, made.operands, made.sizes, "eager"))


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n]("float32").spec.mask])
def test_mask_knowledge_is_true(name: str) -> None:
    made = CASES[name]("float32")
    reference.check_mask(made.spec, made.operands, made.sizes)


@pytest.mark.parametrize("name", ["plain", "value_wider_than_key", "cross_attention", "no_batch", "heads_last_output"])
def test_without_a_mask_it_is_sdpa(name: str) -> None:
    out, (q, k, v) = exact(name)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_grouped_heads_are_sdpa_with_enable_gqa() -> None:
    out, (q, k, v) = exact("grouped_query")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_causal_is_sdpa_with_is_causal() -> None:
    out, (q, k, v) = exact("causal")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_zero_rule_is_what_sdpa_gives_for_fully_masked_rows() -> None:
    out, (q, k, v) = exact("masked_rows_are_zero")
    keep = (torch.arange(37) != 3)[:, None].expand(37, 37)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, keep))
    assert not out[:, :, 3].any()


def test_infinite_fill_gives_nan_rows_and_finite_fill_averages() -> None:
    out, _ = exact("masked_rows_infinite_fill")
    assert torch.equal(out.isnan().all(-1), (torch.arange(37) == 3).expand(2, 3, 37))
    out, (_, _, v) = exact("masked_rows_lowest_fill")
    torch.testing.assert_close(out[:, :, 3], v.mean(-2))


def test_packed_projection_is_split_into_query_key_value() -> None:
    out, (packed,) = exact("packed_qkv")
    q, k, v = (x.unflatten(-1, (3, 16)).transpose(1, 2) for x in packed.chunk(3, -1))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_alibi_by_hand() -> None:
    out, (q, k, v, slope) = exact("alibi")
    distance = torch.arange(37)[None] - torch.arange(37)[:, None]
    s = q @ k.mT / 4 + slope[:, None, None] * distance
    torch.testing.assert_close(out, s.masked_fill(distance > 0, -math.inf).softmax(-1) @ v)


def test_sinks_by_hand() -> None:
    out, (q, k, v, sink) = exact("sinks")
    s = (q @ k.mT / 4).masked_fill(torch.ones(37, 37).triu(1).bool(), -math.inf)
    logits = torch.cat((s, sink.reshape(3, 1, 1).expand(2, 3, 37, 1)), -1)
    torch.testing.assert_close(out, logits.softmax(-1)[..., :-1] @ v)


def test_softmax_plus_one_by_hand() -> None:
    out, (q, k, v) = exact("softmax_plus_one")
    weights = (q @ k.mT / 4).exp()
    torch.testing.assert_close(out, weights / (1 + weights.sum(-1, keepdim=True)) @ v)


def test_what_roundings_decide_is_decided_as_in_eager() -> None:
    out, (q, k, v) = exact("positions_in_bfloat16")
    i = torch.arange(550).bfloat16()
    torch.testing.assert_close(out, (q @ k.mT / 4).masked_fill(i > i[:, None], -math.inf).softmax(-1) @ v)


def test_no_keys_give_zero() -> None:
    out, _ = exact("no_keys")
    assert out.shape == (2, 3, 37, 16) and not out.any()


def test_blocks_of_rows_give_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = CASES["causal_offset"]("float32")
    whole = oracle(made)
    monkeypatch.setattr("fuse.targets.evaluate.BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(oracle(made), whole, rtol=1e-12, atol=1e-12)


def test_coordinates_outside_an_operand_are_harmless_where_not_chosen() -> None:
    table = torch.arange(5.0)
    inside = op("lt", K, 5)
    made = problem("float32", table, score=lambda s: op("where", inside, op("add", s, load(table, 3, K)), s))
    before = problem(
        "float32", table, score=lambda s: op("where", inside, op("add", s, load(table, 3, op("minimum", K, 4))), s)
    )
    assert torch.equal(oracle(made), oracle(before))


def test_an_empty_operand_may_be_read_where_not_chosen() -> None:
    past = torch.empty(2, 0)
    never = op("lt", K, 0)
    made = problem("float32", past, score=lambda s: op("where", never, op("add", s, load(past, 3, B0, K)), s))
    torch.testing.assert_close(oracle(made), oracle(problem("float32")))


def test_overflow_to_infinity_is_kept_by_the_oracle() -> None:
    out, _ = exact("two_lowest_masks_overflow")
    assert not out[:, :, [0, 4, 5]].isnan().any()
    row = problem("float32", score=lambda s: op("add", const(-3e38, "float32"), op("add", s, -3e38)))
    assert oracle(row).isnan().all()


def test_eager_precision_rounds_the_score_to_its_dtype() -> None:
    made = CASES["soft_cap"]("bfloat16")
    q, k, v = made.operands
    by_hand = ((q @ k.mT * 0.25 / 3).tanh() * 3).softmax(-1) @ v
    assert torch.equal(reference.attention(made.spec, made.operands, made.sizes, "eager"), by_hand)


def test_eager_precision_takes_constants_as_python_numbers() -> None:
    made = CASES["head_dim_24"]("bfloat16")
    q, k, v = made.operands
    by_hand = (q @ k.mT * 24**-0.5).softmax(-1) @ v
    assert torch.equal(reference.attention(made.spec, made.operands, made.sizes, "eager"), by_hand)


def test_autocast_does_not_reach_inside() -> None:
    made = CASES["plain"]("float32")
    with torch.autocast("cpu"):
        made.check(reference.attention(made.spec, made.operands, made.sizes, "eager"))


def test_unknown_precision_is_refused() -> None:
    made = CASES["plain"]("float32")
    with pytest.raises(ValueError, match="neither 'exact' nor 'eager'"):
        reference.attention(made.spec, made.operands, made.sizes, "fast")


def wrong(mask: Mask, what: str) -> Mask:
    return {
        "visible": replace(mask, visible=op("add", mask.visible, 1.0)),
        "fill": replace(mask, predicate=op("lt", K, Q), residual=op("lt", K, Q), upper=None),
        "predicate": replace(mask, upper=op("add", Q, 2)),
        "decreases": replace(mask, upper=op("sub", 37, Q)),
    }[what]


@pytest.mark.parametrize("what", ["visible", "fill", "predicate", "decreases"])
def test_a_false_mask_is_found(what: str) -> None:
    made = CASES["causal"]("float32")
    assert made.spec.mask is not None
    spec = replace(made.spec, mask=wrong(made.spec.mask, what))
    with pytest.raises(InvalidSpec, match=what):
        reference.check_mask(spec, made.operands, made.sizes)


def test_weight_reads_the_probability_of_its_own_entry() -> None:
    out, (q, k, v, gate) = exact("weight_factor")
    torch.testing.assert_close(out, (q @ k.mT / 4).softmax(-1) * gate[:, None, None] @ v)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", RANDOM_CASES)
def test_eager_precision_draws_what_exact_draws(name: str, dtype: str) -> None:
    made = RANDOM_CASES[name](dtype)
    made.check(reference.attention(made.spec, made.operands, made.sizes, "eager"))


def test_dropout_by_hand() -> None:
    made = RANDOM_CASES["dropout"]("float32")
    q, k, v = (t.double() for t in made.operands[:3])
    i = torch.arange(37)
    numbers = philox.uniform(made.operands[3], torch.arange(6).view(2, 3, 1, 1), i[:, None], i)
    p = (q @ k.mT / 4).softmax(-1) * (numbers < 0.8) / 0.8
    torch.testing.assert_close(oracle(made), p @ v)
