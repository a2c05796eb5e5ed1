"""Encoders with a decoder that looks at them: two sites in each layer of the decoder."""

from __future__ import annotations

import transformers as hf
from torch import nn

from models import (
    BATCH,
    CAUSAL,
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
    tokens,
)

TARGET_LENGTH = 45


@model("T5", sites=4, masks=(PADDING, CAUSAL))
def t5(attention: str) -> tuple[nn.Module, Inputs]:
    """Unscaled scores and a learned bias of the bucket of the distance, which the encoder's layers share."""
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=HEAD_DIM, d_ff=INNER, num_layers=2, num_decoder_layers=1, num_heads=HEADS,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.T5Model(config), text("right", decoder_input_ids=tokens(TARGET_LENGTH, seed=2))


@model("BART", sites=3, masks=(PADDING, CAUSAL))
def bart(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, max_position_embeddings=POSITIONS, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.BartModel(config), text("right", decoder_input_ids=tokens(TARGET_LENGTH, seed=2))


@model("Whisper", sites=3, masks=(NO_MASK, CAUSAL))
def whisper(attention: str) -> tuple[nn.Module, Inputs]:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=20, d_model=HIDDEN, max_source_positions=77, max_target_positions=POSITIONS,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, attn_implementation=attention,
    )  # fmt: skip
    inputs = {"input_features": noise(BATCH, 20, 2 * 77), "decoder_input_ids": tokens(TARGET_LENGTH, seed=2)}
    return hf.WhisperModel(config), inputs
