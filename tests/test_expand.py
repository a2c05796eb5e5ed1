"""Attention that PyTorch offers as one call is written out where it gets fused, and only there."""

from __future__ import annotations

import pytest
import torch
from programs import pass_over
from torch import Tensor, nn

from fuse.passes.read.graph import operator_name


def layer(**options: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_the_encoder_layer_is_fused_on_its_fast_path(options: dict[str, object]) -> None:
    x, model = torch.randn(2, 10, 32), layer(**options)
    passed = pass_over(model, x)
    assert [s.fused for s in passed.sites] == [True]
    with torch.no_grad():
        torch.testing.assert_close(passed.result, model(x), rtol=1e-5, atol=1e-5)


def test_its_padding_mask_is_recovered() -> None:
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[1, 6:] = True
    x, model = torch.randn(2, 10, 32), layer()
    passed = pass_over(model, x, src_key_padding_mask=padding)
    assert passed.spec.mask is not None
    with torch.no_grad():
        torch.testing.assert_close(passed.result, model(x, src_key_padding_mask=padding), rtol=1e-5, atol=1e-5)


def test_a_call_in_which_nothing_is_fused_stays_one_call() -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 10, 32)

    def program(x: Tensor) -> Tensor:
        out, weights = attention(x, x, x, average_attn_weights=False)
        weights.mul_(2)
        return out + weights.sum()  # type: ignore[no-any-return]

    passed = pass_over(program, x)
    assert [s.fused for s in passed.sites] == [False]
    assert "multi_head_attention_forward" in [operator_name(n) for n in passed.graph.graph.nodes]


def test_nothing_written_out_relies_on_strides() -> None:
    """What is fused may lie otherwise than what was traced."""
    attention = nn.MultiheadAttention(32, 4).eval()
    passed = pass_over(lambda x: attention(x, x, x, need_weights=False)[0], torch.randn(10, 2, 32))
    assert [s.fused for s in passed.sites] == [True]
    assert "view" not in [operator_name(n) for n in passed.graph.graph.nodes]
