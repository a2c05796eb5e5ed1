"""What torch has for a site computes what the site does: what a kernel is timed beside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from calls import call_of, wanted_of
from specs import CASES
from torch import Tensor

import fuse
from fuse import targets
from fuse.ir.expr import Score, apply, const
from fuse.qualify import torchs_own
from fuse.qualify.problem import Problem, whole


@pytest.mark.parametrize(
    "name",
    ["plain", "unscaled", "packed_qkv", "grouped_query", "causal_long", "dense_additive", "alibi", "documents", "no_batch"],
)
def test_sdpa_computes_what_the_spec_says(name: str) -> None:
    made = CASES[name]("float32")
    p = whole(call_of(made, "reference"), wanted_of(made))
    rival = torchs_own.rival(p, wanted_of(made))
    assert rival is not None
    expected = targets.kernel(p.spec, "reference")(p.operands, p.sizes)
    torch.testing.assert_close(rival.attend(*rival.matrices), expected)


@pytest.mark.parametrize("q_len, kv_len", [(1, 40), (40, 1), (1, 1)])
def test_one_query_or_one_key_is_what_sdpa_computes_too(q_len: int, kv_len: int) -> None:
    """Places do not tell an index that has one value: views have it all the same."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias)

    q, k, v = (torch.randn(2, n, 3, 16).transpose(1, 2) for n in (q_len, kv_len, kv_len))
    bias = torch.randn(1, 3, q_len, kv_len)
    torch.compile(attend, backend="fuse", options={"target": "reference", "inner": "eager"})(q, k, v, bias)
    site = fuse.report().sites[-1]
    assert site.spec is not None
    rival = torchs_own.rival(Problem(site.spec, (bias, q, k, v), list(site.sizes)), [False] * 4)
    assert rival is not None
    torch.testing.assert_close(rival.attend(*rival.matrices), attend(q, k, v, bias))


def test_a_score_that_is_divided_has_a_rival_too() -> None:
    made = CASES["plain"]("float32")
    made = replace(made, spec=replace(made.spec, score=apply("div", Score("float32"), const(4.0, "float32"), dtype="float32")))
    rival = torchs_own.rival(p := whole(call_of(made, "reference"), wanted_of(made)), wanted_of(made))
    assert rival is not None
    expected = targets.kernel(p.spec, "reference")(p.operands, p.sizes)
    torch.testing.assert_close(rival.attend(*rival.matrices), expected)


@pytest.mark.parametrize("name", ["soft_cap", "sinks", "weight_factor", "bias_that_is_scaled_too", "features_strided"])
def test_what_sdpa_cannot_say_has_no_rival(name: str) -> None:
    made = CASES[name]("float32")
    rival = torchs_own.rival(whole(call_of(made, "reference"), wanted_of(made)), wanted_of(made))
    assert (rival is None) == (name != "features_strided")


@pytest.mark.parametrize("name", ["sigmoid_attention", "biased_without_a_softmax", "groups_without_a_softmax"])
def test_without_a_softmax_the_rival_is_two_products(name: str) -> None:
    """And one operation between them, the least that there can be."""
    made = CASES[name]("float32")
    rival = torchs_own.rival(p := whole(call_of(made, "reference"), wanted_of(made)), wanted_of(made))
    assert rival is not None
    q, k, v = rival.matrices
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if x.dim() == q.dim() else x for x in (k, v))
    found = rival.attend(*rival.matrices)
    torch.testing.assert_close(found.reshape(p.spec.out_shape(p.sizes)), (q @ k.mT * 0.5) @ v)
