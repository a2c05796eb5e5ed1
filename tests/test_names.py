"""What kernels are called."""

from __future__ import annotations

import pytest
from specs import CASES, RANDOM_CASES

from fuse.kernel.names import kernel_name

NAMES = {
    "plain": "attention",
    "head_dim_7": "attention",
    "causal": "causal",
    "causal_offset": "causal",
    "causal_finite_fill": "causal",
    "window": "causal_window",
    "padding": "padded",
    "left_padding_and_causal": "causal_padded",
    "documents": "causal_documents",
    "packed_sequences": "ranges",
    "dense_bool": "masked",
    "prefix": "masked",
    "dense_additive": "bias",
    "alibi": "causal_bias",
    "soft_cap_causal": "causal_softcap",
    "sinks": "causal_sinks",
    "softmax_plus_one": "plus_one",
    "dropout": "dropout",
    "sigmoid_attention": "unnormalised",
    "retention": "causal_distances_unnormalised",
    "linear_attention_causal": "causal_by_sum",
}


@pytest.mark.parametrize("case", NAMES)
def test_a_kernel_is_called_by_what_it_computes(case: str) -> None:
    spec = {**CASES, **RANDOM_CASES}[case]("float32").spec
    words = kernel_name(spec).removesuffix(f"_float32_{spec.qk_dim}x{spec.v_dim}")
    assert words == NAMES[case]
    assert kernel_name(spec, "backward") == f"{words}_backward_float32_{spec.qk_dim}x{spec.v_dim}"


@pytest.mark.parametrize("case", [*CASES, *RANDOM_CASES])
def test_every_name_is_one_that_the_cache_knows(case: str) -> None:
    name = kernel_name({**CASES, **RANDOM_CASES}[case]("bfloat16").spec, "backward")
    assert name.replace("_", "").isalnum() and len(name) < 80
