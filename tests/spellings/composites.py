"""Attention behind one call: scaled_dot_product_attention, MultiheadAttention, the Transformer layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spellings import named, qkv, rand, spelling

sdpa = F.scaled_dot_product_attention


def keep() -> tuple[Tensor]:
    return (rand(2, 1, 9, 9, seed=5) > -0.5,)


@spelling()
def sdpa_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


@spelling()
def sdpa_by_name_of_arguments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None)


@spelling()
def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


@spelling(kv=14)
def sdpa_causal_more_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """is_causal counts from the upper left corner."""
    return sdpa(q, k, v, is_causal=True)


@spelling(kv=5)
def sdpa_causal_fewer_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


@spelling()
def sdpa_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, scale=0.5)


@spelling(extra=keep)
def sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """True takes part, the opposite of masked_fill."""
    return sdpa(q, k, v, mask)


@spelling(extra=lambda: (rand(2, 1, 9, 9, seed=5) > 1.5,))
def sdpa_bool_mask_with_empty_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Rows without any key are zero, not NaN."""
    return sdpa(q, k, v, attn_mask=mask)


@spelling(extra=lambda: (torch.full((9, 9), -torch.inf).triu(1),))
def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, mask, 0.0)


@spelling(extra=lambda: (rand(9, 9, seed=5).masked_fill(torch.arange(9)[:, None] == 4, -torch.inf),))
def sdpa_float_mask_with_empty_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, mask)


@spelling()
def sdpa_mask_made_in_the_graph(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=torch.ones(9, 9, dtype=torch.bool).tril()[None, None])


@spelling(inputs=lambda: (rand(2, 6, 9, 16), rand(2, 2, 9, 16, seed=1), rand(2, 2, 9, 16, seed=2)))
def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, enable_gqa=True, is_causal=True)


@spelling(kv=1, dtype=torch.float16)
def sdpa_float16_below_the_lowest_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum of mask and score is no number of float16, and one of the float32 that scores are computed in."""
    q, k = torch.full_like(q, 2.0), torch.full_like(k, -2.0)
    return sdpa(q, k, v, torch.full((q.shape[-2], 1), torch.finfo(torch.float16).min, dtype=q.dtype), scale=1.0)


@spelling(dtype=torch.bfloat16, extra=keep)
def sdpa_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, mask)


@spelling(shape=(9, 16))
def sdpa_two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


@spelling(shape=(2, 3, 4, 9, 16))
def sdpa_five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


@spelling(inputs=lambda: (rand(2, 3, 9, 16), rand(1, 3, 7, 16, seed=1), rand(1, 1, 7, 16, seed=2)))
def sdpa_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


@spelling(inputs=lambda: (rand(2, 3, 9, 16), rand(2, 3, 9, 16, seed=1), rand(2, 3, 9, 24, seed=2)))
def sdpa_wider_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


@spelling(shape=(2, 9, 48))
def sdpa_between_transposes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(2, 9, 3, 16).transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v).transpose(1, 2).reshape(2, 9, 48)


@spelling(random=True)
def sdpa_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, dropout_p=0.5)


# -------------------------------------------------------------------------------------------------- MultiheadAttention


def mha(**options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.MultiheadAttention(48, 3, batch_first=True, **options).eval(), rand(2, 9, 48)


@spelling(inputs=mha)
def mha_self(attention: nn.Module, x: Tensor) -> Any:
    return attention(x, x, x, need_weights=False)[0]


@spelling(inputs=lambda: (mha()[0], *qkv((2, 9, 48), kv=5)))
def mha_cross(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attention(q, k, v, need_weights=False)[0]


@spelling(inputs=lambda: (*mha(), torch.arange(9) >= torch.tensor([[9], [6]])))
def mha_key_padding_mask(attention: nn.Module, x: Tensor, ignored: Tensor) -> Any:
    return attention(x, x, x, key_padding_mask=ignored, need_weights=False)[0]


@spelling(inputs=mha)
def mha_causal(attention: nn.Module, x: Tensor) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    return attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


@spelling(inputs=lambda: (*mha(), torch.arange(9) >= torch.tensor([[9], [6]]), torch.ones(9, 9).triu(1).bool()))
def mha_both_masks(attention: nn.Module, x: Tensor, ignored: Tensor, hidden: Tensor) -> Any:
    return attention(x, x, x, key_padding_mask=ignored, attn_mask=hidden, need_weights=False)[0]


@spelling(inputs=mha)
def mha_weights_returned(attention: nn.Module, x: Tensor) -> Any:
    return attention(x, x, x)


@spelling(inputs=mha)
def mha_weights_of_each_head_returned(attention: nn.Module, x: Tensor) -> Any:
    return attention(x, x, x, average_attn_weights=False)


@spelling(inputs=mha)
def mha_weights_asked_for_and_dropped(attention: nn.Module, x: Tensor) -> Any:
    """need_weights is True by default; what nobody reads need not be kept."""
    return attention(x, x, x)[0]


@spelling(1, inputs=lambda: mha(add_zero_attn=True, add_bias_kv=True))
def mha_extra_keys(attention: nn.Module, x: Tensor) -> Any:
    return attention(x, x, x, need_weights=False)[0]


@spelling(inputs=lambda: (mha(kdim=20, vdim=24)[0], rand(2, 9, 48), rand(2, 5, 20), rand(2, 5, 24)))
def mha_other_widths(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attention(q, k, v, need_weights=False)[0]


@spelling(inputs=lambda: (mha()[0], rand(9, 48)))
def mha_without_batch(attention: nn.Module, x: Tensor) -> Any:
    return attention(x, x, x, need_weights=False)[0]


@spelling(random=True, inputs=lambda: (mha(dropout=0.3)[0].train(), rand(2, 9, 48)), grad=True)
def mha_training(attention: nn.Module, x: Tensor) -> Any:
    return attention(x, x, x, need_weights=False)[0]


# --------------------------------------------------------------------------------------------------------- Transformer


def layer(kind: type[nn.Module], training: bool, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(48, 3, 64, batch_first=True, **options).train(training)


@spelling(inputs=lambda: (layer(nn.TransformerEncoderLayer, False), rand(2, 9, 48)))
def encoder_layer(encoder: nn.Module, x: Tensor) -> Any:
    """Runs as one fast-path call where no gradient is needed."""
    return encoder(x)


@spelling(inputs=lambda: (layer(nn.TransformerEncoderLayer, False, norm_first=True, activation="gelu"), rand(2, 9, 48)))
def encoder_layer_norm_first(encoder: nn.Module, x: Tensor) -> Any:
    return encoder(x)


@spelling(
    inputs=lambda: (layer(nn.TransformerEncoderLayer, False), rand(2, 9, 48), torch.arange(9) >= torch.tensor([[9], [6]]))
)
def encoder_layer_padding(encoder: nn.Module, x: Tensor, ignored: Tensor) -> Any:
    return encoder(x, src_key_padding_mask=ignored)


@spelling(inputs=lambda: (layer(nn.TransformerEncoderLayer, False), rand(2, 9, 48)))
def encoder_layer_causal(encoder: nn.Module, x: Tensor) -> Any:
    return encoder(x, src_mask=nn.Transformer.generate_square_subsequent_mask(9), is_causal=True)


@spelling(inputs=lambda: (layer(nn.TransformerEncoderLayer, True, dropout=0.0), rand(2, 9, 48)))
def encoder_layer_in_training_mode_without_gradients(encoder: nn.Module, x: Tensor) -> Any:
    return encoder(x)


@spelling(random=True, inputs=lambda: (layer(nn.TransformerEncoderLayer, True, dropout=0.1), rand(2, 9, 48)), grad=True)
def encoder_layer_training(encoder: nn.Module, x: Tensor) -> Any:
    return encoder(x)


@spelling(2, inputs=lambda: (layer(nn.TransformerDecoderLayer, False), rand(2, 9, 48), rand(2, 5, 48, seed=1)))
def decoder_layer(decoder: nn.Module, x: Tensor, memory: Tensor) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    return decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)


def stack() -> tuple[nn.Module, Tensor]:
    encoder = nn.TransformerEncoder(layer(nn.TransformerEncoderLayer, False), 3, enable_nested_tensor=False)
    return encoder.eval(), rand(2, 9, 48)


spelling(3, inputs=stack)(named(lambda encoder, x: encoder(x), "encoder_of_three_layers"))
