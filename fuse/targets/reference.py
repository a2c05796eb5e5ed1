"""A spec evaluated in plain PyTorch: the oracle of the tests, and what runs where no kernel can be built.

Nothing here is fast. Query rows are computed in blocks, so that no tensor of q_len × kv_len elements exists for long
sequences; ``mask`` is not used, since ``score`` alone is always right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.ir.expr import Expr, Load, Prob, Score
from fuse.ir.gradient import Gradient, gradient
from fuse.ir.grid import Extent, Grid
from fuse.ir.spec import AttentionSpec, InvalidSpec
from fuse.ir.tile_map import EMPTY, FULL, KEYS, ROWS, TileMap
from fuse.ir.weights import weights_shape
from fuse.targets.evaluate import Call, call_of, mean_of_rows, product

# An additive mask of -1e9 leaves -1e9 + s. Mask promises that 256 above ``fill`` suffices; half of it may be used up.
FILL_SLACK = 128.0


def attention(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int], precision: str = "exact") -> Tensor:
    """The result of ``spec``, of shape ``spec.out_shape(sizes)`` and strides ``spec.out_strides(sizes)``.

    precision "exact": float64 throughout and as result; dtypes matter only for what overflows them to infinity, and for what
    roundings decide: see fuse.ir.roundings.
    precision "eager": each node in its own dtype, as eager PyTorch computes it; the result in ``spec.out_dtype``.
    """
    return attention_with_lse(spec, operands, sizes, precision)[0]


def attention_with_lse(
    spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int], precision: str = "exact"
) -> tuple[Tensor, Tensor]:
    """The result as ``attention`` gives it, and the log-sum-exp or total of each row as ``fuse.ir.gradient`` defines it.

    lse  dense, of shape ``spec.lse_shape(sizes)``; in ``spec.lse_dtype``, or in float64 where precision is "exact"
    """
    call = call_of(spec, operands, sizes, precision)
    shape, strides = spec.out_shape(sizes), spec.out_strides(sizes)
    out = torch.empty_strided(shape, strides, dtype=call.dtype(spec.out_dtype), device=call.device)
    lse = torch.empty(spec.lse_shape(sizes), dtype=call.dtype(spec.lse_dtype), device=call.device)
    with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
        key, value = call.key(), call.value()
        for rows in call.blocks():
            found = call.probabilities(rows, key)
            weight = call.entries(spec.weight, rows, {Prob: found.prob})
            out[..., slice(*rows), :] = product(weight, value).to(out.dtype)
            lse[..., slice(*rows)] = found.lse
    return out, lse


def attention_max(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The largest score of each row as eager computes scores, dense, of shape ``spec.lse_shape(sizes)`` in ``spec.lse_dtype``.

    -inf in a row that sees no key.
    """
    call = call_of(spec, operands, sizes, "eager")
    found = torch.full(spec.lse_shape(sizes), -math.inf, dtype=call.dtype(spec.lse_dtype), device=call.device)
    if call.kv_len == 0:
        return found
    with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
        key = call.key()
        for rows in call.blocks():
            found[..., slice(*rows)] = call.score(rows, key)[1].amax(-1).to(found.dtype)
    return found


def attention_backward(
    spec: AttentionSpec,
    grad_out: Tensor,
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: Sequence[bool],
    precision: str = "exact",
    grad_lse: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of the ``wanted`` operands, in their order, each laid out as ``empty_like`` of it (exact: in float64).

    The softmax is computed again, so that neither the result nor its log-sum-exp is needed.
    """
    backward = _Backward(call_of(spec, operands, sizes, precision), gradient(spec, tuple(wanted)))
    with torch.no_grad(), torch.autocast(grad_out.device.type, enabled=False):
        return backward.run(grad_out, grad_lse)


def weights(
    spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int], heads: int = 0, precision: str = "exact"
) -> Tensor:
    """The matrix of what ``spec.weight`` makes of each probability, dense, of shape ``weights_shape(spec, sizes, heads)``."""
    call = call_of(spec, operands, sizes, precision)
    matrix = torch.empty(weights_shape(spec, sizes, heads), dtype=call.dtype(spec.out_dtype), device=call.device)
    with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
        key = call.key()
        for rows in call.blocks():
            matrix[..., slice(*rows), :] = call.weights(rows, key, heads)
    return matrix


def weights_at_once(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int], heads: int = 0) -> Tensor:
    """As ``weights`` with precision "eager", of operations that PyTorch can differentiate: every score of the call is held."""
    call = call_of(spec, operands, sizes, "eager")
    with torch.autocast(call.device.type, enabled=False):
        return call.weights((0, call.q_len), call.key(), heads).to(call.dtype(spec.out_dtype))


def weights_second(
    spec: AttentionSpec, grad: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], wanted: Sequence[bool], heads: int,
    grads: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """As ``attention_second``, of ``weights_backward``."""

    def matrix(*leaves: Tensor) -> tuple[Tensor]:
        rest = iter(leaves)
        found = weights_at_once(spec, [next(rest) if w else t for t, w in zip(operands, wanted, strict=True)], sizes, heads)
        return (found.to(grad.dtype),)

    (by_grad,), by_leaves = _second(matrix, (grad,), [t for t, w in zip(operands, wanted, strict=True) if w], grads)
    return by_grad, by_leaves


def attention_second(
    spec: AttentionSpec,
    given: tuple[Tensor, ...],
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The derivatives of ``attention_backward`` by what it was ``given`` and by the wanted operands, from those of its results.

    given  grad_out, and grad_lse if there is one
    grads  of its results

    PyTorch's own derivative of a derivative: every score of the call is held.
    """

    def results(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = iter(leaves)
        call = call_of(spec, [next(rest) if w else t for t, w in zip(operands, wanted, strict=True)], sizes, "eager")
        rows = (0, call.q_len)
        found = call.probabilities(rows, call.key())
        out = product(call.entries(spec.weight, rows, {Prob: found.prob}), call.value())
        return tuple(x.to(grad.dtype) for x, grad in zip((out, found.lse), given, strict=False))

    return _second(results, given, [t for t, w in zip(operands, wanted, strict=True) if w], grads)


def _second(
    results: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Of the backward pass of ``results``, a function of ``leaves``, which was ``given`` their gradients."""

    def backward(grads: tuple[Tensor, ...], *leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(results, *leaves)[1](grads)  # type: ignore[no-any-return]

    with torch.autocast(given[0].device.type, enabled=False):
        by_given, *by_leaves = torch.func.vjp(backward, given, *leaves)[1](tuple(grads))
        return by_given, by_leaves


# -------------------------------------------------------------------------------------------------------- backward


@dataclass(frozen=True)
class _Backward:
    """One backward pass; the names are those of ``fuse.ir.gradient``."""

    call: Call
    gradient: Gradient

    def run(self, grad_out: Tensor, grad_lse: Tensor | None) -> list[Tensor]:
        sums = [torch.zeros(t.shape, dtype=self._dtype(t), device=t.device) for t in self._wanted()]
        numbers = [i for i, wanted in enumerate(self.gradient.wanted) if wanted]
        totals = dict(zip(numbers, sums, strict=True))
        key, value = self.call.key(), self.call.value()
        for rows in self.call.blocks():
            own = None if grad_lse is None else grad_lse[..., slice(*rows), None]
            self._rows(rows, grad_out[..., slice(*rows), :], own, key, value, totals)
        return [self._like(t).copy_(x) for x, t in zip(sums, self._wanted(), strict=True)]

    def _wanted(self) -> list[Tensor]:
        return [t for t, wanted in zip(self.call.operands, self.gradient.wanted, strict=True) if wanted]

    def _like(self, operand: Tensor) -> Tensor:
        return torch.empty_like(operand, dtype=torch.float64 if self.call.exact else operand.dtype)

    def _dtype(self, operand: Tensor) -> torch.dtype:
        """What is summed up in."""
        return torch.float64 if self.call.exact else torch.promote_types(operand.dtype, torch.float32)

    def _rows(
        self, rows: Extent, grad_out: Tensor, grad_lse: Tensor | None, key: Tensor, value: Tensor, totals: dict[int, Tensor]
    ) -> None:
        """Adds to ``totals``, operand → gradient, what these rows contribute."""
        call, spec, of = self.call, self.call.spec, self.gradient
        found = call.probabilities(rows, key)
        leaves: dict[type[Expr], Tensor] = {Score: found.raw, Prob: found.prob}
        weight = call.entries(spec.weight, rows, leaves)
        d_weight = product(grad_out, value.mT).to(weight.dtype)
        d_prob = (d_weight * call.entries(of.weight, rows, leaves)).to(found.prob.dtype)
        delta = mean_of_rows(spec, found.prob, d_prob)
        delta = delta if grad_lse is None else delta - grad_lse
        d_score = found.rate * (d_prob - delta)
        d_raw = (d_score * call.entries(of.score, rows, leaves)).to(found.raw.dtype)
        keys, d, e = (0, call.kv_len), (0, spec.qk_dim), (0, spec.v_dim)
        if of.query:
            self._scatter(spec.query, product(d_raw, key), totals, q=rows, d=d)
        if of.key:
            self._scatter(spec.key, product(d_raw.mT, call.query(rows)), totals, k=keys, d=d)
        if of.value:
            self._scatter(spec.value, product(weight.mT, grad_out), totals, k=keys, e=e)
        of_root = {"score": d_score, "weight": d_weight}
        of_root |= {f"extra_logits.{i}": -p * delta for i, p in enumerate(found.extra)}
        for term in of.terms:
            grad = of_root[term.root] * call.entries(term.factor, rows, leaves)
            self._scatter(term.load, grad, totals, q=rows, k=(0, grad.shape[-1]))

    def _scatter(self, load: Load, grad: Tensor, totals: Mapping[int, Tensor], **ranges: Extent) -> None:
        """Adds ``grad``, over the batch and ``ranges``, to the operand's total at the coordinates of ``load``."""
        self.call.grid(**ranges).scatter(grad, load, totals[load.operand])


# ----------------------------------------------------------------------------------------------------------- masks


def tile_map(spec: TileMap, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The map, uint8 of shape ``spec.out_shape(sizes)``."""
    batch, (q_len, kv_len) = sizes[: spec.batch], sizes[spec.batch : spec.batch + 2]
    symbols = dict(zip(spec.symbols, sizes, strict=True))
    out = torch.empty(spec.out_shape(sizes), dtype=torch.uint8, device=operands[0].device)
    for row in range(0, q_len, ROWS):
        extents = {f"b{i}": (0, n) for i, n in enumerate(batch)} | {"q": (row, min(row + ROWS, q_len)), "k": (0, kv_len)}
        seen = Grid.over(extents, symbols, operands, exact=False).evaluate(spec.predicate, {})
        seen = seen.expand(*(stop - start for start, stop in extents.values()))
        cells = [cell.flatten(-2) for cell in seen.split(KEYS, -1)]
        out[..., row // ROWS, :] = torch.stack([c.any(-1).byte() + c.all(-1).byte() for c in cells], -1)
    return out


def check_mask(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Raises InvalidSpec unless ``spec.mask`` says the truth about ``spec.score`` on these operands."""
    if spec.mask is None:
        return
    mask, call = spec.mask, Call(spec, operands, sizes, exact=True)
    rows = (0, call.q_len)
    leaves: dict[type[Expr], Tensor] = {Score: product(call.query(rows), call.key().mT)}

    def entries(root: Expr) -> Tensor:
        return call.entries(root, rows, leaves).expand(*call.batch_shape, call.q_len, call.kv_len)

    score, predicate = entries(spec.score), entries(mask.predicate)
    found, visible = score[predicate], entries(mask.visible)[predicate]
    low = (found < -1e3) & torch.isclose(found, visible, rtol=1 / 128)  # numbers of masks are rounded where they are folded
    _require(bool((low | torch.isclose(found, visible, equal_nan=True)).all()), "visible is not the score")
    hidden = score[~predicate]
    highest = mask.fill + (FILL_SLACK if mask.fill == -math.inf else max(FILL_SLACK, -mask.fill / 128))
    unseen = hidden.isnan() | (hidden == math.inf)  # which is not looked at: docs/numerics.md
    _require(bool(((hidden <= highest) | unseen).all()), "a masked score exceeds fill")
    claimed = torch.ones_like(predicate) if mask.residual is None else entries(mask.residual)
    position = torch.arange(call.kv_len, device=call.device)
    for name, bound in (("lower", mask.lower), ("upper", mask.upper)):
        if bound is not None:
            limit = call.entries(bound, rows, {})
            _require(bool((limit.diff(dim=-2) >= 0).all()), f"{name} decreases with q")
            claimed = claimed & (position >= limit if name == "lower" else position < limit)
    _require(torch.equal(predicate, claimed), "predicate is not lower <= k < upper and residual")
    if mask.tiles is not None and mask.residual is not None:
        seen, cell = entries(mask.residual), call.entries(mask.tiles, rows, {})
        _require(not bool((seen & (cell == EMPTY)).any()), "a tile that is said to be empty is not")
        _require(bool((seen | (cell != FULL)).all()), "a tile that is said to be full is not")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidSpec(f"mask: {what}")
