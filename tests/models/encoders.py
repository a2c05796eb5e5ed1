"""Encoders of text, images, and both."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from models import (
    BATCH,
    CAUSAL_PADDING,
    EAGER_ONLY,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    NO_MASK,
    PADDING,
    POSITIONS,
    VOCABULARY,
    Inputs,
    model,
    noise,
    text,
)


def bert_like(attention: str, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS, "attn_implementation": attention,
    } | more  # fmt: skip


@model("BERT", sites=2, masks=(PADDING,))
def bert(attention: str) -> tuple[nn.Module, Inputs]:
    return hf.BertModel(hf.BertConfig(**bert_like(attention, num_hidden_layers=2))), text("right")


@model("RoBERTa", sites=1, masks=(PADDING,))
def roberta(attention: str) -> tuple[nn.Module, Inputs]:
    return hf.RobertaModel(hf.RobertaConfig(**bert_like(attention))), text("right")


@model("ALBERT", sites=2, masks=(PADDING,))
def albert(attention: str) -> tuple[nn.Module, Inputs]:
    return hf.AlbertModel(hf.AlbertConfig(**bert_like(attention, num_hidden_layers=2, embedding_size=32))), text("left")


@model("DistilBERT", sites=1, masks=(PADDING,))
def distilbert(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, hidden_dim=INNER, n_layers=1, n_heads=HEADS, max_position_embeddings=POSITIONS,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.DistilBertModel(config), text("right")


@model(
    "DeBERTa-v2",
    sites=1,
    masks=("attention_mask[k] * attention_mask[q] != 0",),
    implementations=EAGER_ONLY,
)
def deberta_v2(attention: str) -> tuple[nn.Module, Inputs]:
    """Content to position and position to content, by gathers of buckets of the distance."""
    config = bert_like(
        attention, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False,
    )  # fmt: skip
    return hf.DebertaV2Model(hf.DebertaV2Config(**config)), text("right")


@model("XLNet", sites=1, masks=("non_tgt_mask[q, k] != 1",), implementations=EAGER_ONLY)
def xlnet(attention: str) -> tuple[nn.Module, Inputs]:
    """Relative positions by a shift of the scores; texts along the first dimension."""
    config = hf.XLNetConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, n_layer=1, n_head=HEADS, d_inner=INNER, attn_implementation=attention
    )
    return hf.XLNetModel(config), text("left")


@model("ModernBERT", sites=2, masks=(PADDING, f"abs(q - k) <= 12 and {PADDING}"))
def modernbert(attention: str) -> tuple[nn.Module, Inputs]:
    """A layer that sees all, one with a window to both sides."""
    config = bert_like(attention, num_hidden_layers=2, local_attention=24, pad_token_id=0)
    return hf.ModernBertModel(hf.ModernBertConfig(**config)), text("right")


@model("ViT", sites=1, masks=(NO_MASK,))
def vit(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.ViTConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS, image_size=48,
        patch_size=8, attn_implementation=attention,
    )  # fmt: skip
    return hf.ViTModel(config), {"pixel_values": noise(BATCH, 3, 48, 48)}


@model("Swin", sites=2, masks=(NO_MASK,))
def swin(attention: str) -> tuple[nn.Module, Inputs]:
    """Windows of 5 x 5 of the image with a learned bias; every second layer is shifted and masks what wrapped around."""
    config = hf.SwinConfig(
        image_size=40, patch_size=2, embed_dim=3 * HEAD_DIM, depths=[2], num_heads=[3], window_size=5,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.SwinModel(config), {"pixel_values": noise(BATCH, 3, 40, 40)}


@model("CLIP", sites=2, masks=(NO_MASK, CAUSAL_PADDING))
def clip(attention: str) -> tuple[nn.Module, Inputs]:
    """A causal encoder of text and an encoder of images."""
    shared = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    words = shared | {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "eos_token_id": 2}
    config = hf.CLIPConfig(
        text_config=words, vision_config=shared | {"image_size": 48, "patch_size": 8}, projection_dim=32,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.CLIPModel(config), text("right", pixel_values=noise(BATCH, 3, 48, 48))
