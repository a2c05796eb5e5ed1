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

from fuse import philox
from fuse.expr import FLOATS, Apply, Const, Expr, Index, Load, Prob, Score, Symbol, walk
from fuse.spec import AttentionSpec, InvalidSpec

# Scores computed at a time: 32 MB in float64, whatever the sequence length.
BLOCK_ELEMENTS = 2**22

# An additive mask of -1e9 leaves -1e9 + s. Mask promises that 256 above ``fill`` suffices; half of it may be used up.
FILL_SLACK = 128.0

Range = tuple[int, int]


def attention(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int], precision: str = "exact") -> Tensor:
    """The result of ``spec``, of shape ``spec.out_shape(sizes)`` and strides ``spec.out_strides(sizes)``.

    precision "exact": float64 throughout and as result; dtypes matter only for what overflows them to infinity.
    precision "eager": each node in its own dtype, as eager PyTorch computes it; the result in ``spec.out_dtype``.
    """
    if precision not in ("exact", "eager"):
        raise ValueError(f"precision {precision!r} is neither 'exact' nor 'eager'")
    site = _Site(spec, operands, sizes, precision == "exact")
    out = torch.empty_strided(
        spec.out_shape(sizes), spec.out_strides(sizes), dtype=site.dtype(spec.out_dtype), device=site.device
    )
    rows = max(1, BLOCK_ELEMENTS // max(1, math.prod(site.batch_shape) * site.kv_len))
    with torch.no_grad(), torch.autocast(site.device.type, enabled=False):
        key, value = site.key(), site.value()
        for start in range(0, site.q_len, rows):
            stop = min(start + rows, site.q_len)
            out[..., start:stop, :] = site.rows((start, stop), key, value).to(out.dtype)
    return out


@dataclass(frozen=True)
class _Site:
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
        return torch.float64 if self.exact and name in FLOATS else _torch_dtype(name)

    def query(self, rows: Range) -> Tensor:
        return self._matrix(self.spec.query, q=rows, d=(0, self.spec.qk_dim))

    def key(self) -> Tensor:
        return self._matrix(self.spec.key, k=(0, self.kv_len), d=(0, self.spec.qk_dim))

    def value(self) -> Tensor:
        return self._matrix(self.spec.value, k=(0, self.kv_len), e=(0, self.spec.v_dim))

    def _matrix(self, load: Load, **ranges: Range) -> Tensor:
        """``load`` over the batch and ``ranges``; batch dimensions that it does not depend on have size 1."""
        matrix = self.frame(**ranges).evaluate(load, {})
        return matrix.expand(*matrix.shape[:-2], *(stop - start for start, stop in ranges.values()))

    def frame(self, **ranges: Range) -> _Frame:
        """The grid of the batch indices and of ``ranges``, in this order."""
        extents = {f"b{i}": (0, size) for i, size in enumerate(self.batch_shape)} | ranges
        indices = {
            axis: torch.arange(*extent, device=self.device).reshape([-1 if i == dim else 1 for i in range(len(extents))])
            for dim, (axis, extent) in enumerate(extents.items())
        }
        return _Frame(self, indices, dict(zip(self.spec.symbols, self.sizes, strict=True)))

    def entries(self, root: Expr, rows: Range, leaves: Mapping[type[Expr], Tensor]) -> Tensor:
        """``root`` over batch, q, k, where ``leaves`` gives the value of Score or Prob."""
        given = {n: leaves[type(n)].to(self.dtype(n.dtype)) for n in walk(root) if type(n) in leaves}
        value = self.frame(q=rows, k=(0, self.kv_len)).evaluate(root, given)
        return value.expand(*self.batch_shape, rows[1] - rows[0], value.shape[-1])

    def rows(self, rows: Range, key: Tensor, value: Tensor) -> Tensor:
        """The query rows ``rows`` of the result: scores, softmax, weights, product with the values."""
        score = self.entries(self.spec.score, rows, {Score: self.query(rows) @ key.mT})
        score = score.expand(*score.shape[:-1], self.kv_len)
        extra = [self.entries(x, rows, {}).to(score.dtype) for x in self.spec.extra_logits]
        prob = torch.cat((score, *extra), -1).softmax(-1)[..., : self.kv_len]
        if self.spec.empty_row == "zero":
            prob = prob.masked_fill((score == -math.inf).all(-1, keepdim=True), 0.0)
        weight = self.entries(self.spec.weight, rows, {Prob: prob})
        common = torch.promote_types(weight.dtype, value.dtype)
        return weight.to(common) @ value.to(common)


# ----------------------------------------------------------------------------------------------------- expressions


@dataclass(frozen=True)
class _Frame:
    """A grid of indices, one dimension each, on which expressions are evaluated."""

    site: _Site
    indices: Mapping[str, Tensor]
    symbols: Mapping[str, int]

    def evaluate(self, root: Expr, given: Mapping[Expr, Tensor]) -> Tensor:
        """The value of ``root``, of size 1 along the dimensions that it does not depend on."""
        values = dict(given)
        for node in walk(root):
            if node not in values:
                values[node] = self._node(node, [values[a] for a in node.args])
        value = values[root].to(self.site.dtype(root.dtype))
        return value if value.dim() else self._scalar(value)

    def _node(self, node: Expr, args: list[Tensor]) -> Tensor:
        if isinstance(node, Const):
            return self._constant(node)
        if isinstance(node, Symbol):
            return self._scalar(torch.tensor(self.symbols[node.name], device=self.site.device))
        if isinstance(node, Index):
            return self.indices[node.axis]
        if isinstance(node, Load):
            return self._load(self.site.operands[node.operand], args).to(self.site.dtype(node.dtype))
        if not isinstance(node, Apply):
            raise InvalidSpec(f"{node} is not in scope")
        value = (args[0] if node.op == "cast" else _OPS[node.op](*args)).to(self.site.dtype(node.dtype))
        return _overflow(value, node.dtype) if self.site.exact and node.dtype in FLOATS else value

    def _constant(self, node: Const) -> Tensor:
        """Of no dimensions and in float64: like a Python number, it is not rounded to the dtype of what it meets."""
        return torch.tensor(node.value, dtype=torch.float64 if node.dtype in FLOATS else _torch_dtype(node.dtype))

    def _scalar(self, value: Tensor) -> Tensor:
        return value.reshape((1,) * len(self.indices))

    def _load(self, tensor: Tensor, coords: list[Tensor]) -> Tensor:
        """Coordinates are clamped: what lies outside is read only for entries that a ``where`` does not choose."""
        if not coords:
            return self._scalar(tensor)
        if tensor.numel() == 0:
            return torch.zeros_like(math.prod(coords, start=coords[0]), dtype=tensor.dtype)
        return tensor[tuple(c.clamp(0, size - 1) for c, size in zip(coords, tensor.shape, strict=True))]


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _overflow(value: Tensor, name: str) -> Tensor:
    """float64 values, infinite where rounding to dtype ``name`` makes them so."""
    limits = torch.finfo(_torch_dtype(name))
    largest = limits.max * (1 + limits.eps / 4)  # halfway to the number that would follow
    return value.masked_fill(value > largest, math.inf).masked_fill(value < -largest, -math.inf)


_OPS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "neg": torch.neg,
    "abs": torch.abs, "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2, "log1p": torch.log1p,
    "expm1": torch.expm1, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "erf": torch.erf, "sin": torch.sin, "cos": torch.cos, "floor": torch.floor,
    "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round, "sign": torch.sign, "isnan": torch.isnan,
    "isinf": torch.isinf, "minimum": torch.minimum, "maximum": torch.maximum, "floordiv": torch.floor_divide,
    "mod": torch.remainder, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt,
    "ge": torch.ge, "not": torch.bitwise_not, "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "where": torch.where, "uniform": philox.uniform,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- masks


def check_mask(spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Raises InvalidSpec unless ``spec.mask`` says the truth about ``spec.score`` on these operands."""
    if spec.mask is None:
        return
    mask, site = spec.mask, _Site(spec, operands, sizes, exact=True)
    rows = (0, site.q_len)
    leaves: dict[type[Expr], Tensor] = {Score: site.query(rows) @ site.key().mT}

    def entries(root: Expr) -> Tensor:
        return site.entries(root, rows, leaves).expand(*site.batch_shape, site.q_len, site.kv_len)

    score, predicate = entries(spec.score), entries(mask.predicate)
    _require(torch.allclose(score[predicate], entries(mask.visible)[predicate], equal_nan=True), "visible is not the score")
    _require(bool((score[~predicate] <= mask.fill + FILL_SLACK).all()), "a masked score exceeds fill")
    claimed = torch.ones_like(predicate) if mask.residual is None else entries(mask.residual)
    position = torch.arange(site.kv_len, device=site.device)
    for name, bound in (("lower", mask.lower), ("upper", mask.upper)):
        if bound is not None:
            limit = site.entries(bound, rows, {})
            _require(bool((limit.diff(dim=-2) >= 0).all()), f"{name} decreases with q")
            claimed = claimed & (position >= limit if name == "lower" else position < limit)
    _require(torch.equal(predicate, claimed), "predicate is not lower <= k < upper and residual")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidSpec(f"mask: {what}")
