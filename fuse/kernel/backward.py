"""BackwardProgram: what kernels of gradients compute, as expressions, for every target alike; formulas in fuse.ir.gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from fuse.ir import expr
from fuse.ir.expr import Const, Expr, Load, const
from fuse.ir.gradient import Gradient, gradient
from fuse.ir.spec import AttentionSpec
from fuse.kernel.destinations import Destination, destinations
from fuse.kernel.forward import ForwardProgram, forward_program, peel

# A log-sum-exp below this has lost digits that the probabilities of its row need.
_IMPRECISE = -1000.0


@dataclass(frozen=True)
class BackwardProgram:
    """
    of                the derivatives; those of its ``score`` and ``terms`` are of the score as eager rounds it
    destinations      where gradients go
    slope             the derivative of a visible entry's score by the raw one, without its constant factor
    scale             that factor: left out of every slope, and multiplied in the end
    factors           of a visible entry, for each of ``of.terms``
    recomputed_below  rows of no larger log-sum-exp are normalised again from every score; None where there is no such row
    """

    forward: ForwardProgram
    of: Gradient
    destinations: tuple[Destination, ...]
    slope: Expr
    scale: float
    factors: tuple[Expr, ...]
    recomputed_below: float | None

    @property
    def as_eager(self) -> bool:
        """Whether the scores of rows that are normalised again are rounded as eager's: as forward has them in such rows."""
        return self.forward.threshold is not None

    @property
    def spec(self) -> AttentionSpec:
        return self.forward.spec


@cache
def backward_program(spec: AttentionSpec, wanted: tuple[bool, ...]) -> BackwardProgram:
    """``wanted`` has one entry for each operand. Raises Unsupported, as ``destinations`` does."""
    of, found = gradient(spec, wanted), destinations(spec, wanted)
    slope, scale = _peeled(of.score if of.visible is None else of.visible)
    factors = tuple(t.factor if t.visible is None else t.visible for t in of.terms)
    return BackwardProgram(forward_program(spec), of, found, slope, scale, factors, recomputed_below(spec))


@cache
def recomputed_below(spec: AttentionSpec) -> float | None:
    """See BackwardProgram."""
    if not spec.softmax:
        return None
    maskable = spec.mask is not None or any(
        isinstance(n, Load) or (isinstance(n, Const) and n.dtype in expr.FLOATS and abs(n.value) >= -_IMPRECISE)
        for n in expr.walk(spec.score)
    )
    return max(_IMPRECISE, forward_program(spec).threshold or -math.inf) if maskable else None


def recomputed_above(lse_dtype: str) -> float:
    """Of specs with such rows, those of no smaller finite log-sum-exp are normalised again, too: where that is kept in
    ``lse_dtype``, its rounding would change the probabilities of the row."""
    return 1e6 if lse_dtype == "float64" else -_IMPRECISE


def _peeled(node: Expr) -> tuple[Expr, float]:
    """(inner, c) with node = c * inner, c > 0: as ``peel``, and what is the same for all entries is one."""
    inner, factor = peel(node)
    if isinstance(inner, Const) and 1e-30 < inner.value < 1e30:
        return const(1.0, inner.dtype), factor * inner.value
    return inner, factor


def is_one(node: Expr) -> bool:
    return isinstance(node, Const) and node.value == 1


# ------------------------------------------------------------------------------------------------------------- as text


@dataclass(frozen=True)
class Added:
    """What an entry adds to a destination; ``tiled``: a tile of entries at a time."""

    name: str
    kind: str
    text: str
    tiled: bool = False


@dataclass(frozen=True)
class Results:
    """Texts of what an entry gives: ``weight``; ``rate``, by which the score's gradient is multiplied; ``gate``, the
    probability's gradient; ``slope``, the raw score's."""

    weight: str
    rate: str
    gate: str
    slope: str
    terms: tuple[Added, ...]
