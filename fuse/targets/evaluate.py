"""One call of a spec in plain PyTorch: rows of scores, of probabilities, and of what multiplies the values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.ir.expr import Expr, Load, Prob, Score, walk
from fuse.ir.grid import Extent, Grid, dtype_of
from fuse.ir.spec import AttentionSpec

# Scores computed at a time: 32 MB in float64, whatever the sequence length.
BLOCK_ELEMENTS = 2**22


def call_of(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int], precision: str) -> Call:
    if precision not in ("exact", "eager"):
        raise ValueError(f"precision {precision!r} is neither 'exact' nor 'eager'")
    return Call(spec, operands, sizes, precision == "exact")


def mean_of_rows(spec: AttentionSpec, prob: Tensor, x: Tensor) -> Tensor:
    """Of each row of ``x``; nothing where rows are not normalised."""
    mean = (prob * x).sum(-1, keepdim=True)
    return mean if spec.normalisation != "none" else torch.zeros_like(mean)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in the wider of both dtypes."""
    common = torch.promote_types(a.dtype, b.dtype)
    return a.to(common) @ b.to(common)


@dataclass(frozen=True)
class Probabilities:
    """Rows of the raw score, of the probabilities of the keys, of those of the extra logits, and their log-sum-exp or total.

    rate  what a score's gradient is multiplied by, beside the probability's less ``delta``
    """

    raw: Tensor
    prob: Tensor
    extra: tuple[Tensor, ...]
    lse: Tensor
    rate: Tensor


@dataclass(frozen=True)
class Call:
    """One call: the spec with its data."""

    spec: AttentionSpec
    operands: Sequence[Tensor]
    sizes: Sequence[int]
    exact: bool

    @property
    def device(self) -> torch.device:
        return self.operands[0].device

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[: self.spec.batch])

    @property
    def q_len(self) -> int:
        return self.sizes[self.spec.batch]

    @property
    def kv_len(self) -> int:
        return self.sizes[self.spec.batch + 1]

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(name, self.exact)

    def query(self, rows: Extent) -> Tensor:
        return self._matrix(self.spec.query, q=rows, d=(0, self.spec.qk_dim))

    def key(self) -> Tensor:
        return self._matrix(self.spec.key, k=(0, self.kv_len), d=(0, self.spec.qk_dim))

    def value(self) -> Tensor:
        return self._matrix(self.spec.value, k=(0, self.kv_len), e=(0, self.spec.v_dim))

    def _matrix(self, load: Load, **ranges: Extent) -> Tensor:
        """``load`` over the batch and ``ranges``; batch dimensions that it does not depend on have size 1."""
        matrix = self.grid(**ranges).evaluate(load, {})
        return matrix.expand(*matrix.shape[:-2], *(stop - start for start, stop in ranges.values()))

    def grid(self, **ranges: Extent) -> Grid:
        """The grid of the batch indices and of ``ranges``, in this order."""
        extents = {f"b{i}": (0, size) for i, size in enumerate(self.batch_shape)} | ranges
        symbols = dict(zip(self.spec.symbols, self.sizes, strict=True))
        return Grid.over(extents, symbols, self.operands, self.exact)

    def entries(self, root: Expr, rows: Extent, leaves: Mapping[type[Expr], Tensor]) -> Tensor:
        """``root`` over batch, q, k, where ``leaves`` gives the value of Score or Prob."""
        given = {n: leaves[type(n)].to(self.dtype(n.dtype)) for n in walk(root) if type(n) in leaves}
        value = self.grid(q=rows, k=(0, self.kv_len)).evaluate(root, given)
        return value.expand(*self.batch_shape, rows[1] - rows[0], value.shape[-1])

    def blocks(self) -> Iterator[Extent]:
        """Ranges of rows whose entries fit BLOCK_ELEMENTS."""
        rows = max(1, BLOCK_ELEMENTS // max(1, math.prod(self.batch_shape) * self.kv_len))
        for start in range(0, self.q_len, rows):
            yield start, min(start + rows, self.q_len)

    def score(self, rows: Extent, key: Tensor) -> tuple[Tensor, Tensor]:
        """The products of queries and keys, and what becomes of them."""
        raw = product(self.query(rows), key.mT)
        score = self.entries(self.spec.score, rows, {Score: raw})
        return raw, score.expand(*score.shape[:-1], self.kv_len)

    def weights(self, rows: Extent, key: Tensor, heads: int) -> Tensor:
        """Of these rows; means over so many ``heads`` that are not 0."""
        return self.averaged(self.entries(self.spec.weight, rows, {Prob: self.probabilities(rows, key).prob}), heads)

    def averaged(self, matrix: Tensor, heads: int) -> Tensor:
        if heads == 0:
            return matrix
        groups = math.prod(self.batch_shape) // heads
        return matrix.to(self.dtype(self.spec.out_dtype)).reshape(groups, heads, *matrix.shape[-2:]).mean(1)

    def probabilities(self, rows: Extent, key: Tensor) -> Probabilities:
        raw, score = self.score(rows, key)
        return self._softmax(rows, raw, score) if self.spec.softmax else self._divided(raw, score)

    def _softmax(self, rows: Extent, raw: Tensor, score: Tensor) -> Probabilities:
        extra = [self.entries(x, rows, {}).to(score.dtype) for x in self.spec.extra_logits]
        logits = torch.cat((score, *extra), -1)
        prob, lse = logits.softmax(-1), logits.to(self.dtype(self.spec.lse_dtype)).logsumexp(-1)
        if self.spec.empty_row == "zero":
            empty = (score == -math.inf).all(-1, keepdim=True)
            prob, lse = prob.masked_fill(empty, 0.0), lse.masked_fill(empty[..., 0], math.inf)
        keys, *rest = prob.split([self.kv_len] + [1] * len(extra), -1)
        return Probabilities(raw, keys, tuple(rest), lse, keys)

    def _divided(self, raw: Tensor, score: Tensor) -> Probabilities:
        """By its sum, or by nothing."""
        by_sum = self.spec.normalisation == "sum"
        total = score.sum(-1, keepdim=True) if by_sum else score.new_ones((*score.shape[:-1], 1))
        return Probabilities(raw, score / total, (), total[..., 0].to(self.dtype(self.spec.lse_dtype)), 1 / total)
