"""Forward-mode derivatives of a spec, which no kernel has: plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.ir.expr import Expr, Prob, Score
from fuse.ir.gradient import Gradient, gradient
from fuse.ir.grid import Extent
from fuse.ir.spec import AttentionSpec
from fuse.ir.weights import weights_shape
from fuse.targets.evaluate import Call, call_of, mean_of_rows, product


def attention_tangent(
    spec: AttentionSpec, operands: Sequence[Tensor], tangents: Sequence[Tensor | None], sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The derivatives of the result and of its rows' log-sum-exp along ``tangents``, one for each operand or None: forward-mode
    differentiation.

    The tangent of a softmax is prob * (t - sum of prob * t), t the scores'; that sum is the log-sum-exp's. That of s / sum of s
    is t / sum of s - prob * sum of (t / sum of s). Laid out as these.
    """
    tangent = _tangent(spec, operands, tangents, sizes)
    out = torch.empty_strided(
        spec.out_shape(sizes), spec.out_strides(sizes), dtype=getattr(torch, spec.out_dtype), device=operands[0].device
    )
    lse = torch.empty(spec.lse_shape(sizes), dtype=getattr(torch, spec.lse_dtype), device=out.device)
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        for rows in tangent.call.blocks():
            of_out, of_lse = tangent.rows(rows)
            out[..., slice(*rows), :], lse[..., slice(*rows)] = of_out.to(out.dtype), of_lse[..., 0].to(lse.dtype)
    return out, lse


def weights_tangent(
    spec: AttentionSpec, operands: Sequence[Tensor], tangents: Sequence[Tensor | None], sizes: Sequence[int], heads: int
) -> Tensor:
    """As ``attention_tangent``, of ``weights``."""
    tangent = _tangent(spec, operands, tangents, sizes)
    matrix = torch.empty(weights_shape(spec, sizes, heads), dtype=getattr(torch, spec.out_dtype), device=operands[0].device)
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        for rows in tangent.call.blocks():
            matrix[..., slice(*rows), :] = tangent.call.averaged(tangent.weights(rows)[0], heads)
    return matrix


def _tangent(
    spec: AttentionSpec, operands: Sequence[Tensor], tangents: Sequence[Tensor | None], sizes: Sequence[int]
) -> _Tangent:
    wanted = tuple(t is not None for t in tangents)
    still = [torch.zeros_like(x) if x.is_floating_point() else x for x in operands]  # integers say where others are read
    along = [x if t is None else t for x, t in zip(still, tangents, strict=True)]
    return _Tangent(call_of(spec, operands, sizes, "eager"), call_of(spec, along, sizes, "eager"), gradient(spec, wanted))


@dataclass(frozen=True)
class _Tangent:
    """``along`` is the call with tangents in the place of the operands; the other names are those of ``fuse.ir.gradient``."""

    call: Call
    along: Call
    gradient: Gradient

    def rows(self, rows: Extent) -> tuple[Tensor, Tensor]:
        """Of the result and of the log-sum-exp."""
        of_weight, mean, weight = self.weights(rows)
        return product(of_weight, self.call.value()) + product(weight, self.along.value()), mean

    def weights(self, rows: Extent) -> tuple[Tensor, Tensor, Tensor]:
        """Of the weights and of the log-sum-exp, and the weights."""
        call, along, spec = self.call, self.along, self.call.spec
        key = call.key()
        found = call.probabilities(rows, key)
        leaves: dict[type[Expr], Tensor] = {Score: found.raw, Prob: found.prob}
        raw = product(along.query(rows), key.mT) + product(call.query(rows), along.key().mT)
        score = raw * call.entries(self.gradient.score, rows, leaves) + self._terms("score", rows, leaves)
        mean = mean_of_rows(spec, found.rate, score)
        for i, p in enumerate(found.extra):
            mean = mean + p * self._terms(f"extra_logits.{i}", rows, leaves)
        prob = found.rate * score - found.prob * mean
        of_weight = prob * call.entries(self.gradient.weight, rows, leaves) + self._terms("weight", rows, leaves)
        return of_weight, mean, call.entries(spec.weight, rows, leaves)

    def _terms(self, root: str, rows: Extent, leaves: Mapping[type[Expr], Tensor]) -> Tensor | float:
        """What loads add to the tangent of ``root``."""
        terms = [t for t in self.gradient.terms if t.root == root]
        return sum(self.call.entries(t.factor, rows, leaves) * self.along.entries(t.load, rows, {}) for t in terms)
