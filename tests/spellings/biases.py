"""Biases that models compute or gather: ALiBi, T5, Swin, relative positions, skewed and decomposed ones."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spellings import qkv, rand, spelling


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 4


def attend(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


# -------------------------------------------------------------------------------------------------------------- ALiBi


def slopes() -> tuple[Tensor]:
    return (torch.tensor([0.5, 0.25, 0.125]),)


@spelling(extra=slopes)
def alibi(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k) + slope[:, None, None] * (i[None, :] - i[:, None]), v)


@spelling(extra=slopes)
def alibi_symmetric(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k) - slope.view(1, 3, 1, 1) * (i[None, :] - i[:, None]).abs(), v)


@spelling(extra=slopes)
def alibi_per_key_with_causal_mask(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """MPT: only the key's position matters, the rest of the row cancels."""
    bias = slope.view(1, 3, 1, 1) * torch.arange(1 - 9, 1).view(1, 1, 1, 9)
    s = scores(q, k) + bias
    return attend(s.masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(q.dtype).min), v)


@spelling(inputs=lambda: (*qkv((6, 9, 16)), *slopes(), torch.ones(2, 9, dtype=torch.long)))
def alibi_from_attention_mask(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, mask: Tensor) -> Tensor:
    """BLOOM: positions are counted along the mask, the bias enters baddbmm."""
    position = ((mask.cumsum(-1) - 1) * mask)[:, None, :]
    alibi = (slope[:, None] * position).reshape(6, 1, 9)
    return torch.bmm(alibi.baddbmm(q, k.mT, beta=1.0, alpha=0.25).softmax(-1), v)


# --------------------------------------------------------------------------------------- tables: T5, Swin, BEiT, LeViT


def bucket(distance: Tensor) -> Tensor:
    """T5's buckets for both directions, 8 of them."""
    sign = (distance > 0).long() * 4
    distance = distance.abs()
    large = 2 + (torch.log(distance.float() / 2) / math.log(16 / 2) * 2).long()
    return sign + torch.where(distance < 2, distance, torch.min(large, torch.full_like(large, 3)))


@spelling(extra=lambda: (rand(8, 3, seed=5),))
def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """No scale, one table for the heads, the bias made in the graph."""
    distance = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    bias = F.embedding(bucket(distance), table).permute([2, 0, 1]).unsqueeze(0)
    return attend(q @ k.transpose(3, 2) + bias, v)


@spelling(extra=lambda: (rand(8, 3, seed=5), torch.randint(8, (9, 9), generator=torch.Generator().manual_seed(0))))
def table_by_index_tensor(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor) -> Tensor:
    return attend(scores(q, k) + table[places].permute(2, 0, 1), v)


@spelling(extra=lambda: (rand(26, 3, seed=5), torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 2], dtype=torch.int32)))
def table_by_segments_and_distances(q: Tensor, k: Tensor, v: Tensor, table: Tensor, segments: Tensor) -> Tensor:
    """CPM-Ant's: places in int32, of the distance within a segment, of both segments beyond."""
    at = torch.arange(9, dtype=torch.int32)
    distance = at[None, :] - at[:, None] + 8
    across = segments[:, None] * 3 + segments[None, :] + 17
    bias = F.embedding(torch.where(segments[:, None] == segments[None, :], distance, across), table)
    return attend(scores(q, k) + bias.permute(2, 0, 1), v)


def swin() -> tuple[Tensor, ...]:
    """Windows of 3 × 3: a table of 25 distances, 3 heads, its index, a mask for each of 2 windows."""
    places = torch.arange(81).reshape(9, 9) % 25
    return rand(25, 3, seed=5), places, rand(2, 9, 9, seed=6).sign().clamp(max=0) * 100


@spelling(inputs=lambda: (*qkv((8, 3, 9, 16)), *swin()))
def swin_shifted_windows(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    bias = table[places.view(-1)].view(9, 9, -1).permute(2, 0, 1).contiguous()
    s = q * 0.25 @ k.transpose(-2, -1) + bias.unsqueeze(0)
    s = s.view(8 // 2, 2, 3, 9, 9) + mask.unsqueeze(1).unsqueeze(0)
    return attend(s.view(-1, 3, 9, 9), v)


@spelling(inputs=lambda: (*qkv((8, 3, 9, 16)), *swin()))
def swin_v2_cosine(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    bias = 16 * torch.sigmoid(table[places.view(-1)].view(9, 9, -1).permute(2, 0, 1))
    s = (s + bias).view(4, 2, 3, 9, 9) + mask[:, None]
    return attend(s.view(8, 3, 9, 9), v)


@spelling(extra=lambda: (rand(3, 25, seed=5), torch.arange(81).reshape(9, 9) % 25))
def table_by_head_first(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """LeViT."""
    return attend(scores(q, k) + table[:, places], v)


@spelling(extra=lambda: (rand(3, 9, 2, 9, seed=5),))
def table_at_places_with_a_slice_between(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """What tensors index apart from one another comes first: (q, k, head, 2)."""
    i = torch.arange(9)
    return attend(scores(q, k) + table[:, i[:, None], :, i][..., 1].permute(2, 0, 1), v)


@spelling(extra=lambda: (rand(3, 9, seed=5),))
def table_at_negative_places(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """They count from the end."""
    i = torch.arange(9)
    return attend(scores(q, k) + table[:, i - i[:, None]], v)


@spelling(extra=lambda: (rand(3, 1, 1, seed=5),))
def distance_in_blocks_towards_zero(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k) + slope * torch.div(i - i[:, None], 4, rounding_mode="trunc"), v)


# -------------------------------------------------------------------------------------- relative to the query or the key


@spelling(extra=lambda: (rand(17, 16, seed=5),))
def relative_key(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """BERT's relative_key: a vector for each distance, times the query."""
    i = torch.arange(9)
    vectors = table[i[:, None] - i[None] + 8]
    return attend((q @ k.mT + torch.einsum("bhld,lrd->bhlr", q, vectors)) / 4, v)


@spelling(extra=lambda: (rand(17, 16, seed=5),))
def relative_by_gather(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """DeBERTa: query times all distances, gathered along the keys."""
    i = torch.arange(9)
    places = (i[:, None] - i[None] + 8).expand(2, 3, 9, 9)
    return attend(scores(q, k) + torch.gather(q @ table.T, -1, places) / 4, v)


@spelling(extra=lambda: (rand(17, 16, seed=5),))
def relative_by_gather_both_ways(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """DeBERTa-v2: content to position and position to content."""
    i = torch.arange(9)
    places = (i[:, None] - i[None] + 8).expand(2, 3, 9, 9)
    to_position = torch.gather(q @ table.T, -1, places)
    from_position = torch.gather(k @ table.T, -1, places.mT).mT
    return attend((q @ k.mT + to_position + from_position) / math.sqrt(16 * 3), v)


@spelling(extra=lambda: (rand(17, 32, seed=5), rand(32, 3, 16, seed=6)))
def relative_by_gather_of_projected_positions(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
    """Funnel: what queries are multiplied with are products, too, of which keys read a part each."""
    projected = torch.einsum("td,dhe->the", positions, weight) / 6
    places = torch.arange(9) - torch.arange(9)[:, None] + 8
    of_all = torch.einsum("bhqe,the->bhqt", q, projected)
    return attend(scores(q, k) + torch.gather(of_all, -1, places.expand(2, 3, 9, 9)) / 4, v)


@spelling(extra=lambda: (rand(3, 17, 16, seed=5),))
def relative_shift_by_padding(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Transformer-XL: pad, view as if a column shorter, slice."""
    s = q @ table.mT  # (2, 3, 9, 17): column r belongs to distance 8 - r
    padded = F.pad(s, (1, 0)).view(2, 3, 18, 9)
    shifted = padded[:, :, 1:].reshape(2, 3, 9, 17)[..., :9]
    return attend(scores(q, k) + shifted, v)


@spelling(extra=lambda: (rand(2, 3, 9, 17, seed=5),))
def relative_shift_by_cat(q: Tensor, k: Tensor, v: Tensor, distances: Tensor) -> Tensor:
    """Wav2Vec2-Conformer."""
    padded = torch.cat([torch.zeros(2, 3, 9, 1), distances], dim=-1).view(2, 3, 18, 9)
    return attend(scores(q, k) + padded[:, :, 1:].view_as(distances)[..., : 17 // 2 + 1], v)


@spelling(extra=lambda: (rand(17, 3, seed=5),))
def bias_by_as_strided_windows(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A Toeplitz matrix as windows over one vector."""
    windows = table.t().unfold(-1, 9, 1).flip(1)
    return attend(scores(q, k) + windows, v)


@spelling(extra=lambda: (rand(2, 3, 9, 3, seed=5), rand(2, 3, 9, 3, seed=6)))
def decomposed_relative_positions(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """SAM and MViT: one bias for the row, one for the column of the key in a 3 × 3 grid."""
    bias = (rows[..., :, None] + columns[..., None, :]).view(2, 3, 9, 9)
    return attend(scores(q, k) + bias, v)


@spelling(extra=lambda: (rand(2, 9, 9, 3, seed=5),))
def pair_bias(q: Tensor, k: Tensor, v: Tensor, pair: Tensor) -> Tensor:
    """AlphaFold: a bias per pair and head, heads last."""
    return attend(scores(q, k) + pair.permute(0, 3, 1, 2), v)


@spelling(extra=lambda: (torch.tensor(0.5), torch.tensor(-0.1)))
def distance_decay(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, offset: Tensor) -> Tensor:
    """A function of the distance with learned parameters."""
    i = torch.arange(9)
    return attend(scores(q, k) - F.softplus(rate) * (i[:, None] - i).abs().float().sqrt() + offset, v)


@spelling(extra=lambda: (rand(2, 3, 9, 9, seed=5),))
def gated_scores(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Multiplied, not added."""
    return attend(scores(q, k) * gate.sigmoid(), v)


@spelling(shape=(2, 3, 9, 16), extra=lambda: (rand(3, 16, seed=5), rand(3, 16, seed=6), rand(3, 17, 16, seed=7)))
def transformer_xl(q: Tensor, k: Tensor, v: Tensor, content: Tensor, position: Tensor, table: Tensor) -> Tensor:
    """Two query biases, a relative shift, one scale over both terms."""
    first = (q + content[:, None]) @ k.mT
    second = (q + position[:, None]) @ table.mT
    second = F.pad(second, (1, 0)).view(2, 3, 18, 9)[:, :, 1:].reshape(2, 3, 9, 17)[..., :9]
    return attend((first + second) * 0.25, v)


# ------------------------------------------------------------------------------------------ how what is added was made


@spelling(extra=lambda: (rand(4, 3, 9, 9, seed=5),))
def last_of_several(q: Tensor, k: Tensor, v: Tensor, biases: Tensor) -> Tensor:
    return attend(scores(q, k) + biases.select(0, -1), v)


@spelling(extra=lambda: (rand(3, 9, 9, seed=5),))
def rolled_over_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(scores(q, k) + bias.roll(1, 0), v)


@spelling(extra=lambda: (rand(9, 5, seed=5),))
def written_to_every_second_key(q: Tensor, k: Tensor, v: Tensor, some: Tensor) -> Tensor:
    bias = torch.zeros(9, 9)
    bias[:, ::2] = some
    return attend(scores(q, k) + bias, v)


@spelling(extra=lambda: (rand(9, seed=5),))
def written_to_the_last_key(q: Tensor, k: Tensor, v: Tensor, some: Tensor) -> Tensor:
    bias = torch.zeros(9, 9)
    bias[:, -1] = some
    return attend(scores(q, k) + bias, v)


@spelling(extra=lambda: (rand(17, 3, seed=5),))
def table_with_a_row_that_learns_nothing(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k) + F.embedding(i - i[:, None] + 8, table, padding_idx=3).permute(2, 0, 1), v)


@spelling(extra=lambda: (rand(17, 3, seed=5),))
def table_whose_first_row_learns_nothing(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i = torch.arange(9)
    return attend(scores(q, k) + F.embedding(i - i[:, None] + 8, table, padding_idx=0).permute(2, 0, 1), v)


@spelling(extra=lambda: (rand(3, 1, 1, seed=5),))
def distance_in_blocks_as_a_float(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    i = torch.arange(9.0)
    return attend(scores(q, k) + slope * ((i - i[:, None]) // 4), v)


@spelling(extra=lambda: (rand(3, 1, 1, seed=5),))
def positions_in_halves(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    return attend(scores(q, k) + slope * torch.arange(0, 4.5, 0.5), v)


@spelling(extra=lambda: (rand(9, 9, seed=5).index_fill(1, torch.tensor([2]), -math.inf),))
def infinity_filled_with_the_lowest_number(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(scores(q, k) + bias.nan_to_num(), v)


@spelling(extra=lambda: (rand(9, 9, seed=5),))
def bias_of_reversed_positions(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(scores(q, k) + bias.flip(0, -1) + bias[..., 1:5].fliplr().mean(), v)


@spelling(
    extra=lambda: (rand(9, 9, seed=5).index_fill(1, torch.tensor([2]), math.nan).index_fill(1, torch.tensor([4]), math.inf),)
)
def holes_filled_with_numbers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(scores(q, k) + bias.nan_to_num(nan=-1.0, posinf=2.0), v)


@spelling(extra=lambda: (rand(9, 4, seed=5), rand(9, 5, seed=6)))
def joined_along_the_keys(q: Tensor, k: Tensor, v: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return attend(scores(q, k) + torch.cat((left, right), -1), v)


@spelling(3)
def scores_of_earlier_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Residual attention: each layer adds its scores to the last one's, of whose result they are made."""
    earlier: Tensor | float = 0.0
    for _ in range(3):
        earlier = scores(q, k) + earlier
        q = attend(earlier, v)
    return q


def learned_part() -> tuple[Tensor]:
    return (rand(3, 8, 8, seed=5),)


@spelling(extra=learned_part)
def added_to_a_part_in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """All but the class token's row and column."""
    s = q @ k.mT / 4
    s[:, :, 1:, 1:] += bias
    return s.softmax(-1) @ v


@spelling(extra=learned_part)
def added_to_a_part_by_padding(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT / 4 + F.pad(bias, (1, 0, 1, 0))).softmax(-1) @ v


@spelling(extra=learned_part)
def added_to_a_part_and_joined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.mT / 4
    rows = torch.cat((s[:, :, 1:, :1], s[:, :, 1:, 1:] + bias), -1)
    return torch.cat((s[:, :, :1], rows), -2).softmax(-1) @ v


@spelling(extra=learned_part)
def added_to_the_last_in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Its own scores are read where they are written, at two places."""
    s = q @ k.mT / 4
    s[:, :, -8:, -8:] = s[:, :, -8:, -8:] * 0.5 + bias
    s[..., :4] -= 1
    return s.masked_fill(torch.ones(9, 9).tril() == 0, -math.inf).softmax(-1) @ v


@spelling(extra=lambda: (rand(5, 16, seed=5), rand(7, 16, seed=6)), shape=(2, 3, 13, 16))
def decomposed_beside_a_class_token(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """torchvision's MViT: a bias for the distance of rows, one for that of columns; 3 times 4 patches behind the token."""
    s = q @ k.mT / 4
    at = q[:, :, 1:].unflatten(2, (3, 4))
    i, j = torch.arange(3), torch.arange(4)
    by_rows = torch.einsum("bhywc,ykc->bhywk", at, rows[i[:, None] - i + 2])
    by_columns = torch.einsum("bhywc,wkc->bhywk", at, columns[j[:, None] - j + 3])
    s[:, :, 1:, 1:] += (by_rows[..., :, None] + by_columns[..., None, :]).reshape(2, 3, 12, 12)
    return s.softmax(-1) @ v


@spelling(0, reason="ScoresUsed")
def scores_added_to_other_places(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is written is what lies one place further on."""
    s = q @ k.mT / 4
    return torch.cat((s[..., 1:], s[..., :1]), -1).add(s).softmax(-1) @ v


@spelling()
def numbers_written_in_the_program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.tensor([0.5, 0, 1, -1, 2, 0, 0, 3, -0.25])
    return attend(scores(q, k) + bias - torch.as_tensor([[1.0], [2.0], [3.0]])[:, None] * bias[:, None], v)
