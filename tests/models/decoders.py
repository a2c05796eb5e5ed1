"""Decoders of text: causal, most of them with rotary positions, ALiBi or a window."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from models import (
    CAUSAL,
    CAUSAL_PADDING,
    EAGER_ONLY,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    PADDING,
    POSITIONS,
    VOCABULARY,
    Inputs,
    model,
    text,
)

WINDOW = 20
CAUSAL_WINDOW = f"q - k < {WINDOW} and k <= q"


def llama_like(attention: str, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "pad_token_id": 0,
        "max_position_embeddings": POSITIONS, "attn_implementation": attention,
    } | more  # fmt: skip


@model("GPT-2", sites=1, masks=(CAUSAL_PADDING,))
def gpt2(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=1, n_head=HEADS, attn_implementation=attention
    )
    return hf.GPT2Model(config), text("left")


@model("GPT-J", sites=1, masks=(CAUSAL_PADDING,), implementations=EAGER_ONLY)
def gptj(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.GPTJConfig(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=1, n_head=HEADS, rotary_dim=8,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.GPTJModel(config), text("left")


@model("GPT-NeoX", sites=1, masks=(CAUSAL_PADDING,))
def gpt_neox(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=INNER,
        max_position_embeddings=POSITIONS, attn_implementation=attention,
    )  # fmt: skip
    return hf.GPTNeoXModel(config), text("right")


@model("OPT", sites=1, masks=(CAUSAL_PADDING,))
def opt(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, ffn_dim=INNER,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=HIDDEN, attn_implementation=attention,
    )  # fmt: skip
    return hf.OPTModel(config), text("left")


@model("BLOOM", sites=1, masks=(CAUSAL_PADDING,), implementations=EAGER_ONLY)
def bloom(attention: str) -> tuple[nn.Module, Inputs]:
    """ALiBi over positions that count real tokens only."""
    config = hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=1, n_head=HEADS, attn_implementation=attention)
    return hf.BloomModel(config), text("left")


@model("MPT", sites=1, masks=(CAUSAL_PADDING,), implementations=EAGER_ONLY)
def mpt(attention: str) -> tuple[nn.Module, Inputs]:
    """ALiBi as a bias of the distance to the last key."""
    config = hf.MptConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, n_heads=HEADS, n_layers=1, max_seq_len=POSITIONS, attn_implementation=attention
    )
    return hf.MptModel(config), text("right")


@model("Falcon", sites=1, masks=(CAUSAL_PADDING,))
def falcon(attention: str) -> tuple[nn.Module, Inputs]:
    """One head of keys and values for all."""
    config = hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, ffn_hidden_size=INNER,
        max_position_embeddings=POSITIONS, attn_implementation=attention,
    )  # fmt: skip
    return hf.FalconModel(config), text("left")


@model("Falcon ALiBi", sites=1, masks=(CAUSAL_PADDING,))
def falcon_alibi(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, ffn_hidden_size=INNER,
        alibi=True, multi_query=False, parallel_attn=False, attn_implementation=attention,
    )  # fmt: skip
    return hf.FalconModel(config), text("right")


@model("Llama", sites=2, masks=(CAUSAL,))
def llama(attention: str) -> tuple[nn.Module, Inputs]:
    return hf.LlamaModel(hf.LlamaConfig(**llama_like(attention, num_hidden_layers=2))), text()


@model("Llama padded", sites=1, masks=(CAUSAL_PADDING,))
def llama_padded(attention: str) -> tuple[nn.Module, Inputs]:
    return hf.LlamaModel(hf.LlamaConfig(**llama_like(attention))), text("left")


@model("Mistral", sites=1, masks=(CAUSAL_WINDOW,))
def mistral(attention: str) -> tuple[nn.Module, Inputs]:
    return hf.MistralModel(hf.MistralConfig(**llama_like(attention, sliding_window=WINDOW))), text()


@model("Mixtral", sites=1, masks=(CAUSAL_PADDING,))
def mixtral(attention: str) -> tuple[nn.Module, Inputs]:
    """Each token takes all experts: a choice by rounding would make results of different roundings incomparable."""
    return hf.MixtralModel(hf.MixtralConfig(**llama_like(attention, num_local_experts=2, num_experts_per_tok=2))), text("left")


@model("Qwen3", sites=1, masks=(CAUSAL_PADDING,))
def qwen3(attention: str) -> tuple[nn.Module, Inputs]:
    return hf.Qwen3Model(hf.Qwen3Config(**llama_like(attention))), text("left")


@model("Qwen3-MoE", sites=1, masks=(CAUSAL_PADDING,))
def qwen3_moe(attention: str) -> tuple[nn.Module, Inputs]:
    config = llama_like(attention, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=32)
    return hf.Qwen3MoeModel(hf.Qwen3MoeConfig(**config)), text("right")


@model("Gemma2", sites=2, masks=(f"{CAUSAL_WINDOW} and {PADDING}", CAUSAL_PADDING))
def gemma2(attention: str) -> tuple[nn.Module, Inputs]:
    """Soft-capped scores; a layer with a window, and one without."""
    config = llama_like(
        attention, num_hidden_layers=2, sliding_window=WINDOW, query_pre_attn_scalar=HEAD_DIM, attn_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return hf.Gemma2Model(hf.Gemma2Config(**config)), text("left")


@model("GPT-OSS", sites=2, masks=(f"{CAUSAL_WINDOW} and {PADDING}", CAUSAL_PADDING), implementations=EAGER_ONLY)
def gpt_oss(attention: str) -> tuple[nn.Module, Inputs]:
    """A sink for each head takes part in the softmax; a layer with a window, and one without."""
    config = llama_like(
        attention, num_hidden_layers=2, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return hf.GptOssModel(hf.GptOssConfig(**config)), text("left")
