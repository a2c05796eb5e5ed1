"""Small models as users hand them to the shell, by name: ``python -m fuse explain tests/cli_models.py:gpt2``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Call = tuple[nn.Module, dict[str, Tensor]]


def _of(name: str, inputs: dict[str, Tensor], **sizes: Any) -> Call:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(name, **sizes)).eval(), inputs


def _text(length: int, batch: int = 1) -> Tensor:
    return torch.randint(1, 99, (batch, length))


def gpt2(length: int = 128, batch: int = 1) -> Call:
    return _of("gpt2", {"input_ids": _text(length, batch)}, vocab_size=99, n_embd=64, n_layer=3, n_head=2, n_positions=512)


def llama() -> Call:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return _of("llama", {"input_ids": _text(128)}, vocab_size=99, num_hidden_layers=2, **sizes)


def t5() -> Call:
    inputs = {"input_ids": _text(96), "decoder_input_ids": _text(64)}
    return _of("t5", inputs, vocab_size=99, d_model=64, d_kv=32, d_ff=96, num_layers=2, num_heads=2)


def swin() -> Call:
    sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2], "num_heads": [2], "window_size": 4}
    return _of("swin", {"pixel_values": torch.randn(1, 3, 64, 64)}, **sizes)


class Flex(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (q - k < 64)

        mask = create_block_mask(window, None, None, q.shape[2], q.shape[2], device="cpu")
        result: Tensor = flex_attention(q, q, q, block_mask=mask)
        return result


def flex() -> tuple[nn.Module, tuple[Tensor]]:
    return Flex(), (torch.randn(1, 2, 256, 32),)


class Both(nn.Module):
    """Attention that can be fused, and attention whose scores are a result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x @ x.mT / 4).softmax(-1) @ x
        score = x @ x.mT
        return score.softmax(-1) @ x, score


def both() -> tuple[nn.Module, tuple[Tensor]]:
    return Both(), (torch.randn(1, 48, 16),)


def nothing() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Linear(4, 4), (torch.randn(2, 4),)


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        return (x @ x.mT / 4).masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ x


def causal(batch: int = 1) -> tuple[nn.Module, tuple[Tensor]]:
    return Causal(), (torch.randn(batch, 96, 16),)
