"""How query, key, value and the result lie: batch dimensions, heads, groups, caches, packed projections."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spellings import qkv, rand, spelling


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v


# ---------------------------------------------------------------------------------------------------- batch dimensions


@spelling(shape=(9, 16))
def two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(shape=(2, 9, 16))
def three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(shape=(2, 3, 4, 9, 16))
def five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(shape=(2, 3, 4, 2, 5, 8))
def six_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=lambda: (*qkv((9, 16))[:1], *qkv((2, 3, 9, 16))[1:]))
def query_broadcast_over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=lambda: (rand(2, 3, 9, 16), rand(3, 7, 16, seed=1), rand(2, 1, 7, 16, seed=2)))
def everything_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(shape=(1, 1, 1, 1))
def all_sizes_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(shape=(2, 9, 3, 16))
def heads_moved_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v).transpose(1, 2).contiguous().view(2, 9, 48)


@spelling(shape=(2, 9, 48))
def heads_split_from_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(2, 9, 3, 16).permute(0, 2, 1, 3) for x in (q, k, v))
    return attend(q, k, v).permute(0, 2, 1, 3).reshape(2, 9, 48)


@spelling(shape=(9, 2, 48))
def positions_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fairseq: (position, batch * head, feature)."""
    q, k, v = (x.contiguous().view(9, 6, 16).transpose(0, 1) for x in (q, k, v))
    return attend(q, k, v).transpose(0, 1).contiguous().view(9, 2, 48)


@spelling(shape=(2, 9, 48))
def heads_into_batch_by_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first Transformer in Keras style: heads are cut off the features and stacked on the batch."""
    q, k, v = (torch.cat(x.split(16, dim=2), dim=0) for x in (q, k, v))
    return torch.cat(attend(q, k, v).split(2, dim=0), dim=2)


@spelling(3)
def one_head_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[:, i], k[:, i], v[:, i]) for i in range(3)], dim=1)


@spelling()
def squeezed_where_there_is_no_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is no dimension of one stays."""
    return attend(*(x.squeeze(1).unsqueeze(1).squeeze((0, 1)) for x in (q, k, v)))


@spelling(3)
def heads_unbound(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
    return torch.cat([attend(*head) for head in heads], dim=-1)


@spelling(shape=(2, 3, 4, 16), inputs=lambda: (rand(2, 16, 4, 4), rand(2, 16, 4, 4, seed=1), rand(2, 20, 4, 4, seed=2)))
def image_positions_flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAGAN: one head over the pixels, features first, the result features first."""
    p = torch.bmm(q.flatten(2).mT, k.flatten(2)).softmax(-1)
    return torch.bmm(v.flatten(2), p.mT).view(2, 20, 4, 4)


@spelling(inputs=lambda: (rand(2, 8, 8, 48), rand(2, 8, 8, 48, seed=1), rand(2, 8, 8, 48, seed=2)))
def windows_of_an_image(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Window partition by view and permute, and back."""

    def split(x: Tensor) -> Tensor:
        return x.view(2, 2, 4, 2, 4, 3, 16).permute(0, 1, 3, 5, 2, 4, 6).reshape(8, 3, 16, 16)

    out = attend(split(q), split(k), split(v)).view(2, 2, 2, 3, 4, 4, 16)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(2, 8, 8, 48)


# ------------------------------------------------------------------------------------------- packed, transposed, cross


@spelling(inputs=lambda: (rand(2, 9, 144),))
def packed_chunk(x: Tensor) -> Tensor:
    q, k, v = (part.view(2, 9, 3, 16).transpose(1, 2) for part in x.chunk(3, dim=-1))
    return attend(q, k, v)


@spelling(inputs=lambda: (rand(2, 9, 144),))
def packed_split(x: Tensor) -> Tensor:
    """GPT-2."""
    q, k, v = x.split(48, dim=2)
    q, k, v = (part.view(2, 9, 3, 16).transpose(1, 2) for part in (q, k, v))
    return attend(q, k, v).transpose(1, 2).contiguous().view(2, 9, 48)


@spelling(inputs=lambda: (rand(2, 9, 144),))
def packed_reshape_permute_unbind(x: Tensor) -> Tensor:
    """timm's ViT."""
    q, k, v = x.reshape(2, 9, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v).transpose(1, 2).reshape(2, 9, 48)


@spelling(inputs=lambda: (rand(2, 9, 144),))
def packed_per_head(x: Tensor) -> Tensor:
    """GPT-NeoX: query, key and value of one head lie side by side."""
    x = x.view(2, 9, 3, 48)
    q, k, v = x[..., :16], x[..., 16:32], x[..., 32:]
    q, k, v = (part.permute(0, 2, 1, 3) for part in (q, k, v))
    return attend(q, k, v)


@spelling(inputs=lambda: (rand(2, 3, 9, 16), rand(2, 3, 16, 9, seed=1), rand(2, 3, 9, 16, seed=2)))
def key_stored_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k).softmax(-1) @ v


@spelling(inputs=lambda: (rand(2, 3, 9, 16), rand(2, 3, 9, 16, seed=1), rand(2, 3, 16, 9, seed=2)))
def value_stored_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v.mT


@spelling(kv=14)
def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=lambda: (rand(2, 3, 9, 16), rand(2, 3, 9, 16, seed=1), rand(2, 3, 9, 24, seed=2)))
def wider_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=lambda: (rand(2, 9, 48),))
def one_tensor_is_all_three(x: Tensor) -> Tensor:
    x = x.view(2, 9, 3, 16).transpose(1, 2)
    return attend(x, x, x)


@spelling(shape=(2, 3, 9, 16))
def transposed_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).mT.contiguous()


@spelling(kv=3)
def latent_queries_pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).mean(2)


@spelling(shape=(2, 3, 9, 16), extra=lambda: (rand(9, 8, seed=5), rand(9, 8, seed=6)))
def rotary(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return attend(turn(q), turn(k), v)


@spelling(inputs=lambda: tuple(F.pad(x, (0, 5))[..., :16] for x in qkv()))
def rows_with_gaps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=lambda: (rand(2, 3, 9, 16), rand(2, 3, 9, 8, seed=1), rand(2, 1, 9, 8, seed=2), rand(2, 3, 9, 16, seed=3)))
def key_of_two_parts(q: Tensor, nope: Tensor, rope: Tensor, v: Tensor) -> Tensor:
    """DeepSeek: a part of the key is shared by the heads."""
    return attend(q, torch.cat((nope, rope.expand(2, 3, 9, 8)), -1), v)


# ------------------------------------------------------------------------------------------------------- grouped heads


def grouped(heads: int = 6, groups: int = 2) -> tuple[Tensor, ...]:
    return rand(2, heads, 9, 16), rand(2, groups, 9, 16, seed=1), rand(2, groups, 9, 16, seed=2)


@spelling(inputs=grouped)
def grouped_repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1))


@spelling(inputs=grouped)
def grouped_expand_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' repeat_kv."""
    k, v = (x[:, :, None].expand(2, 2, 3, 9, 16).reshape(2, 6, 9, 16) for x in (k, v))
    return attend(q, k, v)


@spelling(inputs=grouped)
def grouped_repeat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tiled, so that head 2 reads group 0 again."""
    return attend(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))


@spelling(inputs=grouped)
def grouped_unsqueezed_repeat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.unsqueeze(2).repeat(1, 1, 3, 1, 1).flatten(1, 2) for x in (k, v))
    return attend(q, k, v)


@spelling(inputs=grouped)
def grouped_query_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query gets a dimension of groups, nothing is repeated."""
    return attend(q.view(2, 2, 3, 9, 16), k.unsqueeze(2), v.unsqueeze(2)).reshape(2, 6, 9, 16)


@spelling(inputs=grouped)
def grouped_queries_as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries of one group are rows of one matrix."""
    return attend(q.reshape(2, 2, 27, 16), k, v).view(2, 6, 9, 16)


@spelling(inputs=lambda: grouped(6, 1))
def multi_query_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(inputs=lambda: grouped(6, 1))
def multi_query_heads_as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-BigCode: heads and positions are rows of one matrix against one key."""
    s = torch.matmul(q.transpose(1, 2).reshape(2, 54, 16), k[:, 0].mT).view(2, 9, 6, 9)
    p = (s / 4).softmax(-1)
    return torch.bmm(p.view(2, 54, 9), v[:, 0]).view(2, 9, 6, 16)


@spelling(inputs=grouped)
def grouped_by_head_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(6) // 3
    return attend(q, k[:, places], v.index_select(1, places))


# --------------------------------------------------------------------------------------------------------------- caches


def cached() -> tuple[Tensor, ...]:
    new = qkv((2, 3, 2, 16))
    return (*new, rand(2, 3, 7, 16, seed=5), rand(2, 3, 7, 16, seed=6))


@spelling(inputs=cached)
def cache_by_cat(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
    k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
    return attend(q, k, v), k, v


@spelling(inputs=lambda: (*cached(), torch.tensor([4, 5])))
def static_cache_by_index_copy(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, position: Tensor) -> Tensor:
    past_k.index_copy_(2, position, k)
    past_v.index_copy_(2, position, v)
    keep = torch.arange(7)[None] <= position[:, None]
    return (q @ past_k.mT / 4).masked_fill(~keep, -torch.inf).softmax(-1) @ past_v


@spelling(inputs=lambda: (*cached(), torch.tensor([4, 5])))
def static_cache_by_setitem(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, position: Tensor) -> Tensor:
    past_k[:, :, position] = k
    past_v[:, :, position] = v
    return attend(q, past_k, past_v)


@spelling(inputs=cached)
def static_cache_by_slice_copy(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    past_k[:, :, 3:5].copy_(k)
    past_v[:, :, 3:5].copy_(v)
    return attend(q, past_k[:, :, :5], past_v[:, :, :5])


@spelling(inputs=cached)
def memory_in_front(q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor) -> Tensor:
    """Learned keys and values before those of the sequence, causal among the sequence."""
    s = q @ torch.cat((memory_k, k), 2).mT / 4
    s = s.masked_fill(torch.ones(2, 9).triu(8).bool(), -torch.inf)
    return s.softmax(-1) @ torch.cat((memory_v, v), 2)
