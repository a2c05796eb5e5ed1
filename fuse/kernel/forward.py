"""ForwardProgram: what a forward kernel computes, as expressions, for every target alike. A target only writes text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from fuse.ir import expr
from fuse.ir.expr import HALVES, Apply, Const, Expr, Load, Prob, const
from fuse.ir.spec import AttentionSpec

# A row whose largest score lies this far above the fill gives masked entries no weight (see fuse.ir.spec.Mask).
_FILL_MARGIN = 256.0
# Below this, 16-bit roundings in eager swallow part of a score, so such rows are computed with the same roundings.
_ROUNDING_LIMIT = -1000.0
_LEAST, _MOST = 1e-30, 1e30  # of a factor that is peeled: far from what overflows


@dataclass(frozen=True)
class Bound:
    """Keys from ``node`` on ("lower"), or before it ("upper"), may be visible to a query."""

    name: str
    node: Expr


@dataclass(frozen=True)
class ForwardProgram:
    """
    visible    the score of an entry that is seen, without its constant factor
    factor     which joins the one that softmax in base 2 needs anyway, or is the one that is left
    bounds     of the keys that a query may see
    residual   what the mask asks for beside its bounds; None: nothing
    threshold  rows whose largest score is not above this are computed again from every key, with eager's roundings; None where
               none needs to be
    weighted   whether the product with the values takes something else than the probability
    """

    spec: AttentionSpec
    visible: Expr
    factor: float
    bounds: tuple[Bound, ...]
    residual: Expr | None
    threshold: float | None
    weighted: bool

    @property
    def masked(self) -> bool:
        return self.spec.mask is not None


@cache
def forward_program(spec: AttentionSpec) -> ForwardProgram:
    mask = spec.mask
    visible, factor = peel(spec.score if mask is None else mask.visible)
    named = () if mask is None else (("lower", mask.lower), ("upper", mask.upper))
    bounds = tuple(Bound(name, node) for name, node in named if node is not None)
    residual = None if mask is None or mask.residual is const(True, "bool") else mask.residual
    weight, share = peel(spec.weight)
    weighted = not isinstance(weight, Prob) or share != 1.0
    return ForwardProgram(spec, visible, factor, bounds, residual, _threshold(spec), weighted)


def peel(node: Expr) -> tuple[Expr, float]:
    """(inner, c) with node = c * inner, c > 0: the factor then joins the one that softmax in base 2 needs anyway."""
    factor = 1.0
    while isinstance(node, Apply):
        if node.op == "cast" and node.operands[0].dtype in expr.FLOATS:
            node = node.operands[0]
            continue
        found = _factor(node)
        if found is None:
            break
        node, factor = found[0], factor * found[1]
    if isinstance(node, Const) and node.dtype in expr.FLOATS and _LEAST < node.value < _MOST:
        return const(1.0, node.dtype), factor * float(node.value)
    return node, factor


def _factor(node: Apply) -> tuple[Expr, float] | None:
    if node.op not in ("mul", "div"):
        return None
    for this, other in ((node.operands[0], node.operands[1]), (node.operands[1], node.operands[0])):
        positive = isinstance(other, Const) and _LEAST < other.value < _MOST
        if positive and isinstance(other, Const) and (node.op == "mul" or other is node.operands[1]):
            return this, float(other.value) if node.op == "mul" else 1 / float(other.value)
    return None


def _threshold(spec: AttentionSpec) -> float | None:
    """Rows whose largest score is not above this are computed again from every key; None where none needs to be."""
    if not spec.softmax:
        return None
    halves = any(isinstance(n, Apply) and n.dtype in HALVES for n in expr.walk(spec.score))
    unmasked = spec.score if spec.mask is None else spec.mask.visible
    biased = any(
        isinstance(n, Load) or (isinstance(n, Const) and n.dtype in expr.FLOATS and abs(n.value) >= -_ROUNDING_LIMIT)
        for n in expr.walk(unmasked)
    )
    rounding = _ROUNDING_LIMIT if halves and biased else None
    if spec.mask is None:
        return rounding
    return max(spec.mask.fill + _FILL_MARGIN, rounding or -math.inf) if math.isfinite(spec.mask.fill) else None
