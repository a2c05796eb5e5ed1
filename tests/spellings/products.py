"""The two products: matmul, bmm, baddbmm, einsum, sums of products, in either order of operands."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spellings import named, qkv, rand, spelling


@spelling()
def matmul_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.matmul(q, k.transpose(-1, -2)).div(4).softmax(-1), v)


@spelling()
def matmul_method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.matmul(k.permute(0, 1, 3, 2)).mul(0.25).softmax(-1).matmul(v)


@spelling()
def key_times_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT).mT.softmax(-1) @ v


@spelling()
def value_times_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (q @ k.mT).softmax(-1).mT).mT


@spelling(shape=(6, 9, 16))
def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v)


@spelling()
def bmm_of_flattened_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) / 4).softmax(-1), v).view(2, 3, 9, 16)


@spelling(shape=(9, 16))
def mm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.mm(torch.mm(q, k.t()).softmax(-1), v)


@spelling(0, shape=(9, 16))
def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(q, k).softmax(-1), v.t())


@spelling(0, shape=(9, 16), extra=lambda: (rand(9, 9, seed=5),))
def addmm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, q, k.t(), alpha=0.25).softmax(-1) @ v


@spelling(shape=(6, 9, 16))
def baddbmm_without_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BLOOM before 2024, Whisper's relatives: beta 0 means that the input is not read."""
    s = torch.baddbmm(q.new_empty(6, 9, 9), q, k.mT, beta=0, alpha=0.25)
    return torch.bmm(s.softmax(-1), v)


@spelling(shape=(6, 9, 16), extra=lambda: (rand(6, 1, 9, seed=5),))
def baddbmm_with_bias(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    return torch.bmm(alibi.baddbmm(q, k.mT, beta=0.5, alpha=0.25).softmax(-1), v)


@spelling()
def sum_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q[:, :, :, None] * k[:, :, None]).sum(-1) / 4
    return (s.softmax(-1)[..., None] * v[:, :, None]).sum(-2)


@spelling(0, reason="UnsupportedShape")
def one_query_by_sum_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Decoding written without a matmul."""
    s = (q[:, :, :1] * k).sum(-1) / 4
    return (s.softmax(-1).unsqueeze(-1) * v).sum(2)


@spelling()
def one_query_without_its_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention pooling: the query has no position."""
    p = torch.matmul(k, q[:, :, 0].unsqueeze(-1)).squeeze(-1).softmax(-1)
    return torch.matmul(p.unsqueeze(-2), v).squeeze(-2)


@spelling(0, reason="UnsupportedShape", inputs=lambda: (rand(16), *qkv()[1:]))
def one_learned_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A vector of parameters attends to the sequence."""
    return (torch.matmul(k, q).softmax(-1).unsqueeze(-1) * v).sum(-2)


@spelling()
def einsum_value_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhkd,bhqk->bhqd", v, torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(-1))


@spelling(inputs=lambda: (rand(2, 3, 4, 9, 16), *qkv()[1:]))
def einsum_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Four query heads to a key head, as a fifth dimension."""
    p = torch.einsum("bhgqd,bhkd->bhgqk", q, k).softmax(-1)
    return torch.einsum("bhgqk,bhkd->bhgqd", p, v)


@spelling(inputs=lambda: (rand(2, 9, 3, 4, 16), *qkv((2, 9, 3, 16))[1:]))
def einsum_grouped_positions_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("btkgh,bskh->bkgts", q, k).softmax(-1)
    return torch.einsum("bkgts,bskh->btkgh", p, v)


@spelling(inputs=lambda: (rand(2, 6, 9, 16), rand(2, 9, 16), rand(2, 9, 16, seed=1)))
def einsum_multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k).softmax(-1), v)


@spelling(shape=(2, 9, 3, 16), extra=lambda: (rand(3, 16, 20, seed=5),))
def einsum_into_projection(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Product with the values, then the output projection, as two equations."""
    p = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bqhd,hdm->bqm", torch.einsum("bhqk,bkhd->bqhd", p, v), weight)


# name: (scores, product with the values, shape of q, k and v, dimension of the keys in the scores)
EINSUM = {
    "heads_first": ("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd", (2, 3, 9, 16), -1),
    "heads_third": ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", (2, 9, 3, 16), -1),
    "positions_first": ("ibnd,jbnd->bnij", "bnij,jbnd->ibnd", (9, 2, 3, 16), -1),
    "batch_last_in_scores": ("ibnd,jbnd->ijbn", "ijbn,jbnd->ibnd", (9, 2, 3, 16), 1),
    "scores_transposed": ("bhqd,bhkd->bhkq", "bhkq,bhkd->bhqd", (2, 3, 9, 16), 2),
    "feature_major": ("bhdq,bhdk->bhqk", "bhqk,bhdk->bhdq", (2, 3, 16, 9), -1),
    "ellipsis": ("...qd,...kd->...qk", "...qk,...kd->...qd", (2, 3, 9, 16), -1),
    "without_batch": ("qd,kd->qk", "qk,kd->qd", (9, 16), -1),
    "with_spaces": ("b h q d, b h k d -> b h q k", "b h q k, b h k d -> b h q d", (2, 3, 9, 16), -1),
}


def _einsum(scores: str, values: str, dim: int) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum(values, (torch.einsum(scores, q, k) / 4).softmax(dim), v)

    return program


for _name, (_scores, _values, _shape, _dim) in EINSUM.items():
    spelling(shape=_shape)(named(_einsum(_scores, _values, _dim), f"einsum_{_name}"))


def alignment() -> tuple[Tensor, ...]:
    """Queries, keys and values of (batch, heads, rows, positions, features)."""
    return tuple(rand(2, 3, 4, 9, 8, seed=n) for n in range(3))


@spelling(inputs=alignment)
def tied_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MSA Transformer: one row of weights for all rows of an alignment."""
    p = torch.einsum("bhrid,bhrjd->bhij", q, k).mul(0.1).softmax(-1)
    return torch.einsum("bhij,bhrjd->bhrid", p, v)


@spelling(inputs=alignment)
def tied_rows_with_heads_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("bhrid,bhrjd->hbij", q, k).mul(0.1).softmax(-1)
    return torch.einsum("hbij,bhrjd->rbihd", p, v).flatten(-2)


@spelling(inputs=alignment)
def tied_rows_flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(2, 3).flatten(3) for x in (q, k, v))
    return ((q @ k.mT * 0.1).softmax(-1) @ v).unflatten(-1, (4, 8)).transpose(2, 3)


@spelling(inputs=alignment)
def rows_that_are_a_batch_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of the first row are those of all."""
    return (q[:, :, :1] @ k[:, :, :1].mT).softmax(-1) @ v


@spelling(
    0, reason="UnsupportedShape", inputs=lambda: (rand(2, 3, 9, 16), rand(2, 3, 9, 16, seed=1), rand(2, 3, 40, 9, 8, seed=2))
)
def more_features_than_fit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT * 0.25).softmax(-1)
    return torch.einsum("bhij,bhrjd->bhrid", p, v)


@spelling(0, reason="NotLinear", inputs=lambda: (rand(2, 9, 16), rand(2, 9, 16, seed=1), rand(2, 9, 4, 8, seed=2)))
def sum_of_products_with_several_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT * 0.25).softmax(-1)
    return (p[..., None, None] * v[:, None]).sum(2)
