"""What was reported in public of Inductor's patterns of attention and of FlexAttention, as programs of our own.

A number is that of an issue or a pull request of pytorch/pytorch. All are small and run on a CPU; ``python
benchmarks/reported.py`` says what becomes of each with the torch that is installed (docs/reported.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._pytree import tree_leaves

Attend = Callable[..., Any]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Report:
    """``program`` of ``inputs()``.

    truth     the same without a compiler: ``program`` itself, or for FlexAttention products and a softmax
    training  whether the report is about gradients: those of every floating tensor among the inputs are compared too
    dynamic   whether it is about sizes that are symbols
    """

    number: int
    title: str
    program: Callable[..., Any]
    inputs: Callable[[], Inputs]
    truth: Callable[..., Any]
    training: bool = False
    dynamic: bool = False

    @property
    def name(self) -> str:
        return f"{self.number}: {self.title}"

    def error(self, backend: str, options: dict[str, Any] | None = None) -> float:
        """How far the compiled program is from the truth: the largest difference, as a share of the tensor's largest value."""
        compiled = torch.compile(self.program, backend=backend, dynamic=self.dynamic, options=options)
        pairs = zip(self._run(compiled), self._run(self.truth), strict=True)
        return max(((found - expected).abs().max() / expected.abs().max()).item() for found, expected in pairs)

    def _run(self, function: Callable[..., Any]) -> list[Tensor]:
        """The results, and the gradients of the sum of their squares."""
        inputs = self.inputs()
        learned = [x.requires_grad_() for x in inputs if self.training and isinstance(x, Tensor) and x.is_floating_point()]
        with torch.set_grad_enabled(self.training):
            results = tree_leaves(function(*inputs))
        gradients = torch.autograd.grad(sum(x.square().sum() for x in results), learned) if learned else ()
        return [x.detach().double() for x in (*results, *gradients)]


@dataclass(frozen=True)
class NotRun:
    """A report without a program here, and why."""

    number: int
    title: str
    reason: str


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def heads(batch: int = 2, count: int = 4, length: int = 10, width: int = 16) -> tuple[Tensor, ...]:
    """Query, key, value (batch, count, length, width)."""
    return draw(*[(batch, count, length, width)] * 3)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Any:
    """What FlexAttention documents, by products and a softmax; on CPUs it has itself no gradients, compiled or not."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    score = query @ key.mT / math.sqrt(query.shape[-1])
    places = [torch.arange(n).view([-1 if d == dim else 1 for d in range(4)]) for dim, n in enumerate(score.shape)]
    if score_mod is not None:
        score = score_mod(score, *places)
    visible = torch.ones_like(score, dtype=torch.bool)
    if block_mask is not None:
        listed = block_mask.to_dense().bool()
        for dim, size in zip((-2, -1), block_mask.BLOCK_SIZE, strict=True):
            listed = listed.repeat_interleave(size, dim)
        visible &= listed[..., : score.shape[-2], : score.shape[-1]] & block_mask.mask_mod(*places)
    some = visible.any(-1, keepdim=True)
    score = score.masked_fill(~visible, -math.inf).masked_fill(~some, 0.0)
    result = (score.softmax(-1).to(value.dtype) @ value).masked_fill(~some, 0.0)
    return (result, score.logsumexp(-1).masked_fill(~some[..., 0], -math.inf)) if return_lse else result


def plain(number: int, title: str, program: Callable[..., Any], inputs: Callable[[], Inputs], **facts: bool) -> Report:
    return Report(number, title, program, inputs, program, **facts)


def flex(number: int, title: str, program: Callable[..., Any], inputs: Callable[[], Inputs], **facts: bool) -> Report:
    """``program`` has the attention that it calls as its first argument."""
    return Report(number, title, lambda *x: program(flex_attention, *x), inputs, lambda *x: program(attention, *x), **facts)


# Attention that is written out: Inductor's patterns take it for another, or miss it


def masked_by_a_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 4 + mask, -1) @ v


def permuted_and_scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.permute(0, 2, 3, 1) / scale).softmax(-1) @ v


def masked_and_scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return ((q @ k.mT).div(2.0) + mask).softmax(-1).matmul(v)


def without_dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).div(8.0).softmax(-1), 0.0, training=True) @ v


def masked_and_scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    return F.softmax(q @ k.mT / scale + mask, -1) @ v


def permuted_in_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(F.dropout(torch.bmm(q, k.permute(2, 0, 1)).softmax(-1), 0.0), v)


def scaled_by_a_symbol(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def permuted_and_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.permute(0, 2, 3, 1) / 5.0 + mask).softmax(-1) @ v


def permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.matmul(q, k.permute(0, 2, 3, 1)) * 0.35).softmax(-1) @ v


def before_a_layer(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    q, k, v = q.view(1, 1, 2, 1, 8), k.view(1, 1, 2, 2, 8), v.view(1, 1, 2, 2, 8)
    return F.linear(((q @ k.mT) / 8**0.5).softmax(-1).matmul(v).view(2, 1, 8), weight)


def mask_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (mask + q @ k.mT).float().softmax(-1) @ v


def mask_of_another_type(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return (q @ k.mT + mask).float().softmax(-1).to(q.dtype) @ v


def over_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).div(128).softmax(0), 0.23, training=False).matmul(v)


def over_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).div(2.0).softmax(-2) @ v


# SDPA


def gradient_inside(x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: F.scaled_dot_product_attention(x, x, x).square().sum())(x)


def causal_attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


# FlexAttention


def masked(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return attend(q, k, v, block_mask=mask)


def learned_table(attend: Attend, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return attend(q, k, v, lambda s, b, h, i, j: s + table[:, 0][torch.clamp(i - j, -4, 3) + 4])


def mask_and_score(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return attend(q, k, v, lambda s, b, h, i, j: s + 0.1 * (i - j), mask)


def computed_bias(attend: Attend, q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    bias = (0.1 * x @ weight).view(2, 2, 16, 16)
    return attend(q, k, v, lambda s, b, h, i, j: s + bias[b, h, i, j])


def halves(attend: Attend, x: Tensor, weight: Tensor) -> Tensor:
    q, k = (t.transpose(1, 2) for t in (x @ weight / 8).view(2, 16, 2, 2, 32).unbind(2))
    return attend(q, k, k)


def joined(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).transpose(1, 2).reshape(2, 20, 64)


def grouped(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, enable_gqa=True)


def with_statistics(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
    return attend(q, k, v, block_mask=mask, return_lse=True)


def learned_number(attend: Attend, q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    return attend(q, k, v, lambda s, b, h, i, j: s * factor)


def weighted_by_statistics(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    result, statistic = attend(q, k, v, block_mask=mask, return_lse=True)
    return result * (statistic - 5).exp()[..., None]


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def blocks(mask: Callable[..., Tensor], batch: int | None, count: int | None, queries: int, keys: int = 0) -> BlockMask:
    return create_block_mask(mask, batch, count, queries, keys or queries, device="cpu")


def documents() -> Inputs:
    document = torch.repeat_interleave(torch.arange(4), torch.tensor([64, 100, 30, 62]))
    return *heads(1, 2, 256, 32), blocks(lambda b, h, i, j: document[i] == document[j], 1, 1, 256)


def decoding() -> Inputs:
    """Position 300 of two texts of 512."""
    whole = blocks(causal, 2, None, 512)
    row = whole[:, :, 300 // whole.BLOCK_SIZE[0]]
    row.mask_mod = lambda b, h, i, j: causal(b, h, i + 300, j)
    row.seq_lengths = (1, 512)
    return *draw((2, 3, 1, 16), (2, 3, 512, 16), (2, 3, 512, 16)), row


def shuffled() -> Inputs:
    """Keys that lie in any order, and a tensor that tells their positions."""
    position = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    mask = blocks(lambda b, h, i, j: position[j] <= i + 120, 1, 1, 30, 150)
    return *draw((2, 2, 30, 16), (2, 2, 150, 16), (2, 2, 150, 16)), mask


def kinds() -> Inputs:
    """Positions of three kinds; those of the last, at the end of either text, see nothing."""
    kind = torch.tensor([[0] * 20 + [1] * 30 + [2] * 14, [1] * 40 + [2] * 24])
    mask = blocks(lambda b, h, i, j: (kind[b, i] < 2) & ((kind[b, j] == 0) | (i >= j)), 2, None, 64)
    return *heads(2, 2, 64), mask


def listed() -> Inputs:
    """Blocks of 16 by 16, two in each row; mask_mod hides nothing."""
    columns = torch.tensor([[[[0, 3, 1, 2], [1, 0, 2, 3], [2, 1, 0, 3], [3, 2, 0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(torch.full((1, 1, 4), 2, dtype=torch.int32), columns, BLOCK_SIZE=16)
    return *heads(2, 2, 64), mask


REPORTS = (
    plain(100315, "a mask of integers is added", masked_by_a_sum, lambda: (*heads(), torch.arange(10)[None, None, None])),
    plain(
        100316, "keys are permuted, the scale is a tensor of one element", permuted_and_scaled_by_a_tensor,
        lambda: (*heads(1, 4, 4, 8), torch.tensor([3.0])),
    ),
    plain(
        100318, "a bool mask is added, which counts as 0 and 1", masked_by_a_sum,
        lambda: (*heads(), torch.zeros(2, 4, 10, 10, dtype=torch.bool)),
    ),
    plain(
        174049, "a scale that is not one by the root of the width", masked_and_scaled,
        lambda: (*heads(2, 6, 4, 64), torch.zeros(2, 1, 1, 6)),
    ),
    plain(
        179578, "one head, dropout of 0: not eager's digits", without_dropping,
        lambda: heads(count=1, width=64), training=True,
    ),
    plain(181177, "torch.func.grad within", gradient_inside, lambda: heads()[:1]),
    plain(
        185539, "causal, float64, training", causal_attention,
        lambda: draw((1, 2, 4, 3), dtype=torch.float64), training=True,
    ),
    plain(
        191203, "the scale is a tensor without dimensions", masked_and_scaled_by_a_tensor,
        lambda: (*heads(1, 2, 8, 8), torch.full((8, 8), -1e9).triu(1), torch.tensor(0.5)),
    ),
    plain(
        191260, "three dimensions, keys are permuted by more than a transposition", permuted_in_three_dimensions,
        lambda: draw(*[(3, 3, 3)] * 3),
    ),
    plain(194444, "the scale is the root of a size that is a symbol: not fused", scaled_by_a_symbol, heads, dynamic=True),
    plain(
        195282, "keys are permuted, and fit no other reading", permuted_and_masked,
        lambda: draw((1, 3, 5, 8), (1, 4, 3, 8), (1, 3, 4, 8), (1, 3, 5, 4)),
    ),
    plain(195320, "keys are permuted into what the product wants", permuted, lambda: heads(1, 8, 8, 8), training=True),
    plain(
        195589, "five dimensions, and a linear layer behind a view", before_a_layer,
        lambda: draw((2, 1, 8), (2, 2, 8), (2, 2, 8), (8, 8)),
    ),
    plain(
        195782, "the mask is the first operand of the sum: not fused", mask_first,
        lambda: (*heads(4, 16, 2, 32), torch.zeros(1, 1, 1, 2)),
    ),
    plain(
        195784, "float16 and a mask in float32: not fused", mask_of_another_type,
        lambda: (*draw(*[(1, 4, 2, 8)] * 3, dtype=torch.float16), torch.zeros(1, 1, 4, 4)),
    ),
    plain(
        196468, "the softmax runs over the batch, dropout is off", over_the_batch,
        lambda: draw((4, 4, 2, 8), (4, 4, 3, 8), (4, 4, 3, 8)),
    ),
    plain(196468, "the softmax runs over the queries", over_the_queries, lambda: heads(4, 4, 8, 16), training=True),
    flex(
        136232, "weights from the log-sum-exp, the mask cropped, training", weighted_by_statistics,
        lambda: (*heads(1, 2, 100), blocks(causal, None, None, 256)._adjust(100, 100)), training=True,
    ),
    flex(
        139462, "two texts of two positions, the mask cropped from a longer one", masked,
        lambda: (*heads(2, 1, 2), blocks(causal, 2, None, 128, 256)._adjust(2, 2)),
    ),
    flex(143117, "three heads of queries on one of keys", grouped, lambda: draw((1, 9, 5, 16), (1, 3, 5, 16), (1, 3, 5, 16))),
    flex(
        145208, "a learned number in the scores, training", learned_number,
        lambda: (*heads(1, 1, 20), torch.tensor(0.7)), training=True,
    ),
    flex(146151, "values twice as wide as keys", joined, lambda: draw((2, 2, 20, 16), (2, 2, 20, 16), (2, 2, 20, 32))),
    flex(
        146896, "a learned table of distances, one column of it, training", learned_table,
        lambda: (*heads(1, 2, 16, 32), *draw((8, 1))), training=True,
    ),
    flex(148752, "documents, training", masked, documents, training=True),
    flex(
        153799, "a mask and a score function at 129 positions, training", mask_and_score,
        lambda: (*heads(1, 1, 129, 32), blocks(causal, None, None, 129)), training=True,
    ),
    flex(157612, "query and key are halves of one projection", halves, lambda: draw((2, 16, 64), (64, 128))),
    flex(
        157677, "a bias that a layer computes, training", computed_bias,
        lambda: (*heads(2, 2, 16, 32), *draw((2, 24), (24, 512))), training=True,
    ),
    flex(163314, "decoding with one row of a longer text's mask", masked, decoding),
    flex(
        172225, "a BlockMask with heads, shared by the texts", masked,
        lambda: (*heads(3, 4, 130), blocks(lambda b, h, i, j: i - j >= 20 * h, None, 4, 130)),
    ),
    flex(175545, "keys in any order, positions in a captured tensor", masked, shuffled),
    flex(186775, "rows that see nothing, sizes that are symbols", masked, kinds, dynamic=True),
    flex(188322, "the lists of blocks alone are the mask", masked, listed),
    flex(190562, "the log-sum-exp is wanted", with_statistics, lambda: (*heads(length=20), blocks(causal, None, None, 20))),
)  # fmt: skip

NOT_RUN = (
    NotRun(110832, "training with values of another width than the keys", "needs a GPU"),
    NotRun(147551, "a bias that is looked up outside of its table for hidden entries", "needs a GPU: CPUs check indices"),
    NotRun(182766, "training with a head dimension that is no multiple of 16", "needs a GPU"),
)
