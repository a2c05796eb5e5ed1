"""What kernels look like: those of GPT-2's site as text, so that the diff of a template shows as the diff of a kernel.

FUSE_ACCEPT=1 python -m pytest tests/test_expected.py writes tests/expected anew; read the diff before it is committed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from expected_text import ACCEPT, compare
from problems import LOWEST, K, Q, hide, op, problem

import fuse
from fuse.errors import did_you_mean
from fuse.ir.expr import Expr, const
from fuse.ir.spec import AttentionSpec, Mask
from fuse.options import VARIABLES
from fuse.targets.cpp import plan as cpp_plan
from fuse.targets.cpp import render as cpp
from fuse.targets.cpp import render_backward as cpp_backward
from fuse.targets.triton import plan as triton_plan
from fuse.targets.triton import render as triton
from fuse.targets.triton import render_backward as triton_backward

FOLDER = Path(__file__).with_name("expected")
_VERSIONS = re.compile(r"made by torch-fuse .*")


def added_causal_mask(s: Expr) -> tuple[Expr, Mask]:
    """Zero, or the lowest number above the diagonal, is added, as transformers does."""
    seen, lowest = op("le", K, Q), LOWEST[s.dtype]
    _, mask = hide(s, seen, lowest, upper=op("add", const(1), Q))
    return op("add", s, op("where", seen, const(0.0, s.dtype), lowest)), mask


def gpt2(dtype: str) -> AttentionSpec:
    """12 heads of 64 features, whose results lie side by side."""
    return problem(dtype, batch=(1, 12), q_len=1, qk_dim=64, out_order=(0, 2, 1, 3), score=added_causal_mask).spec


def cpp_forward(dtype: str, isa: str) -> str:
    spec = gpt2(dtype)
    return cpp.render(spec, cpp_plan.plan(spec, isa))


def cpp_gradients(dtype: str, isa: str) -> str:
    spec = gpt2(dtype)
    return cpp_backward.render_backward(spec, (True, True, True), cpp_plan.backward_plan(spec, isa, terms=False))


def triton_forward(dtype: str, architecture: str) -> str:
    spec = gpt2(dtype)
    return triton.render_triton(spec, triton_plan.plan_triton(spec, triton_plan.ARCHITECTURES[architecture]))


def triton_gradients(dtype: str, architecture: str) -> str:
    spec = gpt2(dtype)
    described = triton_plan.described(spec, triton_plan.ARCHITECTURES[architecture])
    return triton_backward.render_backward(spec, (True, True, True), described)


KERNELS: dict[str, Callable[[], str]] = {
    "gpt2_forward_float32_avx2.cpp": partial(cpp_forward, "float32", "avx2"),
    "gpt2_backward_float32_avx2.cpp": partial(cpp_gradients, "float32", "avx2"),
    "gpt2_forward_bfloat16_avx512_bf16.cpp": partial(cpp_forward, "bfloat16", "avx512_bf16"),
    "gpt2_backward_bfloat16_avx512_bf16.cpp": partial(cpp_gradients, "bfloat16", "avx512_bf16"),
    "gpt2_forward_bfloat16_sm_90.py": partial(triton_forward, "bfloat16", "sm_90"),
    "gpt2_backward_bfloat16_sm_90.py": partial(triton_gradients, "bfloat16", "sm_90"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_as_it_was_accepted(name: str) -> None:
    compare(FOLDER / name, _VERSIONS.sub("made by torch-fuse …", KERNELS[name]()))


def test_nothing_else_is_expected() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(KERNELS)


def test_fuse_lets_the_variable_that_accepts_through() -> None:
    assert not did_you_mean(ACCEPT, VARIABLES, cutoff=0.8)


@pytest.mark.models
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_this_is_what_gpt2_computes(dtype: str) -> None:
    """All but where its queries lie: in the product that they are a part of."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("gpt2", n_layer=1, vocab_size=64)
    model = AutoModel.from_config(config, attn_implementation="eager").eval().to(getattr(torch, dtype))
    with torch.no_grad():
        (site,) = fuse.explain(model, input_ids=torch.zeros(2, 32, dtype=torch.int64)).sites
    found, expected = site.spec, gpt2(dtype)
    assert found is not None and found.mask is not None and expected.mask is not None
    assert {**found.roots(), "query": None} == {**expected.roots(), "query": None}
    assert (found.mask.fill, found.out_order) == (expected.mask.fill, expected.out_order)
