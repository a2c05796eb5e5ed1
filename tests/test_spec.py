"""AttentionSpec: canonical text, layout of the result, verifier."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import B1, D, E, K, Q, op
from specs import CASES

from fuse.ir.expr import FLOATS, Load, Prob, Score, const, index, symbol
from fuse.ir.spec import AttentionSpec, InvalidSpec, Operand, verify


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_json_gives_back_an_equal_spec_and_the_same_text(name: str, dtype: str) -> None:
    spec = CASES[name](dtype).spec
    text = spec.to_json()
    assert AttentionSpec.from_json(text) == spec
    assert AttentionSpec.from_json(text).to_json() == text


def test_equal_specs_are_interchangeable_as_keys() -> None:
    first, second = (CASES["window"]("float32").spec for _ in range(2))
    assert first == second and hash(first) == hash(second) and first.to_json() == second.to_json()


def test_different_specs_have_different_texts() -> None:
    texts = {CASES[name](dtype).spec.to_json() for name in CASES for dtype in FLOATS}
    assert len(texts) > 0.8 * len(CASES) * len(FLOATS)  # some cases differ in their sizes only
    assert CASES["causal"]("float32").spec.to_json() not in {CASES["plain"]("float32").spec.to_json()}


def test_a_text_of_another_version_is_refused() -> None:
    data = json.loads(CASES["plain"]("float32").spec.to_json())
    with pytest.raises(InvalidSpec, match="version 0"):
        AttentionSpec.from_json(json.dumps(data | {"version": 0}))


def test_sizes_come_in_the_order_of_the_symbols() -> None:
    made = CASES["window"]("float32")
    assert made.spec.symbols == ("B0", "B1", "q_len", "kv_len", "window")
    assert made.sizes == [1, 2, 300, 300, 50]


def test_out_strides_are_those_of_a_dense_permuted_tensor() -> None:
    spec = CASES["heads_last_output"]("float32").spec
    sizes = [2, 3, 37, 37]
    dense = torch.empty(2, 37, 3, 16).transpose(1, 2)
    assert spec.out_shape(sizes) == dense.shape and spec.out_strides(sizes) == dense.stride()


# ------------------------------------------------------------------------------------------------------------ verifier

SPEC = CASES["causal"]("float32").spec
assert SPEC.mask is not None
MASK = SPEC.mask
PROB = Prob("float32")

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "query reads k": ({"query": Load("float32", 0, (K, K, Q, D))}, "query: index 'k'"),
    "key reads q": ({"key": Load("float32", 1, (B1, B1, Q, D))}, "key: index 'q'"),
    "value reads d": ({"value": Load("float32", 2, (B1, B1, K, D))}, "value: index 'd'"),
    "score reads e": ({"score": op("add", Score("float32"), Load("float32", 0, (E, E, E, E)))}, "score: index 'e'"),
    "batch index out of range": ({"score": op("add", SPEC.score, Load("float32", 0, (index("b2"), Q, Q, Q)))}, "index 'b2'"),
    "sink reads k": ({"extra_logits": (Load("float32", 0, (K, K, K, K)),)}, "extra_logits.0: index 'k'"),
    "operand missing": ({"operands": SPEC.operands[:2]}, "operand 2"),
    "rank of an operand": ({"operands": (*SPEC.operands[:2], Operand(3, "float32"))}, "has 3 dimensions"),
    "symbol not given": ({"score": op("where", op("lt", K, symbol("window")), SPEC.score, 0.0)}, "'window'"),
    "score is an integer": ({"score": Q, "mask": None}, "score is int64"),
    "weight is an integer": ({"weight": Q}, "weight is int64"),
    "extra logit is an integer": ({"extra_logits": (Q,)}, "extra_logits.0 is int64"),
    "load of another dtype": ({"value": Load("float16", 2, SPEC.value.coords)}, "is float16, its operand float32"),
    "out_dtype is an integer": ({"out_dtype": "int64"}, "out_dtype 'int64'"),
    "predicate is an integer": ({"mask": replace(MASK, predicate=Q)}, "mask.predicate is int64"),
    "bound is a float": ({"mask": replace(MASK, upper=const(1.0, "float32"))}, "mask.upper is float32"),
    "visible of another dtype": ({"mask": replace(MASK, visible=Score("float64"))}, "mask.visible is float64"),
    "score reads the probability": ({"score": PROB}, "score reads the probability"),
    "weight reads the score": ({"weight": op("mul", PROB, Score("float32"))}, "weight reads the score"),
    "predicate reads the score": (
        {"mask": replace(MASK, predicate=op("lt", Score("float32"), 0.0))},
        "predicate reads the score",
    ),
    "lower bound reads k": ({"mask": replace(MASK, lower=K)}, "mask.lower: index 'k'"),
    "soft fill": ({"mask": replace(MASK, fill=-10.0)}, "fill -10.0"),
    "fill that is NaN": ({"mask": replace(MASK, fill=math.nan)}, "fill nan"),
    "out_order repeats": ({"out_order": (0, 1, 2, 2)}, "no permutation"),
    "out_order too short": ({"out_order": (0, 1, 2)}, "no permutation"),
    "empty_row": ({"empty_row": "average"}, "empty_row 'average'"),
    "qk_dim": ({"qk_dim": 0}, "must be positive"),
    "v_dim": ({"v_dim": 0}, "must be positive"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_verifier_rejects(name: str) -> None:
    change, message = BROKEN[name]
    with pytest.raises(InvalidSpec, match=message):
        verify(replace(SPEC, **change))


def test_query_key_and_value_must_be_loads() -> None:
    data = json.loads(SPEC.to_json())
    data["expr"]["roots"]["query"] = data["expr"]["roots"]["score"]
    with pytest.raises(InvalidSpec, match="must be loads"):
        AttentionSpec.from_json(json.dumps(data))


def test_a_spec_reads_like_its_formula() -> None:
    assert str(CASES["causal"]("float32").spec) == (
        "out[b0, b1, q, e] = sum over k of prob * operand2[b0, b1, k, e]\n"
        "prob = softmax over k of where(k <= q, score * 0.25, -inf)\n"
        "score = sum over d of operand0[b0, b1, q, d] * operand1[b0, b1, k, d]\n"
        "visible where k <= q, that is k < q + 1\n"
        "    there the softmax is of score * 0.25, elsewhere of at most -inf"
    )
