"""Which keys a part of the queries sees at all: the bounds of the mask at its rows.

A mask in closed form, ``lower <= k < upper``, tells every rank what every other one needs, so that all know what to send.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from fuse.ir import expr
from fuse.ir.expr import K_START, LENGTH, PLACES, Q_START, Expr, Load
from fuse.ir.grid import Grid
from fuse.ir.spec import AttentionSpec
from fuse.parallel.layout import Extent, Layout


@cache
def needs(spec: AttentionSpec, sizes: tuple[int, ...], layout: Layout) -> tuple[tuple[Extent, ...], ...]:
    """For each rank, for each of its segments of queries: the keys that have to be there. ``sizes``: of a call on one shard."""
    whole = sizes[spec.batch] * layout.ranks
    segments = [layout.segments(rank, whole) for rank in range(layout.ranks)]
    found = [tuple(_seen(spec, sizes, segment, whole) for segment in own) for own in segments]
    if _exact(spec, sizes, tuple(s for own in segments for s in own), whole):
        return tuple(found)
    return tuple(tuple((0, whole) for _ in own) for own in segments)


def merges(spec: AttentionSpec, sizes: tuple[int, ...], layout: Layout) -> bool:
    """Whether results of parts of the keys are enough to have that of all: by the log-sum-exp of their rows after a softmax,
    and as they are where nothing is normalised."""
    whole = sizes[spec.batch] * layout.ranks
    segments = tuple(s for rank in range(layout.ranks) for s in layout.segments(rank, whole))
    mergeable = spec.normalisation == "none" or (spec.softmax and not spec.extra_logits)
    return mergeable and _exact(spec, sizes, segments, whole)


@cache
def _exact(spec: AttentionSpec, sizes: tuple[int, ...], segments: tuple[Extent, ...], whole: int) -> bool:
    """Whether keys that the mask hides may be missing. A row that sees nothing weighs those that a finite fill hides, each by
    its own score, so that there must be no such row."""
    mask = spec.mask
    if mask is None or mask.fill == -math.inf or not spec.softmax:
        return True
    if mask.residual is not None or not all(_closed(spec, e) for e in (mask.lower, mask.upper)):
        return False
    for start, stop in segments:
        lower, upper = _bounds(spec, sizes, (start, stop), whole)
        if not bool((lower.clamp(min=0) < upper.clamp(max=whole)).all()):
            return False
    return True


def _seen(spec: AttentionSpec, sizes: tuple[int, ...], rows: Extent, whole: int) -> Extent:
    """The least and one past the largest key that any of ``rows`` may see; as many as one where none sees any."""
    if spec.mask is None:
        return 0, whole
    lower, upper = _bounds(spec, sizes, rows, whole)
    first = min(max(int(lower.min()), 0), whole - 1)
    return first, min(max(int(upper.max()), first + 1), whole)


def _bounds(spec: AttentionSpec, sizes: tuple[int, ...], rows: Extent, whole: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask's bounds at each of ``rows``, as far as they are in closed form."""
    assert spec.mask is not None
    symbols = dict(zip(spec.symbols, sizes, strict=True)) | {Q_START: rows[0], K_START: 0, LENGTH: whole}
    grid = Grid.over({"q": (0, rows[1] - rows[0])}, symbols)
    lower, upper = spec.mask.lower, spec.mask.upper
    least = grid.evaluate(lower) if lower is not None and _closed(spec, lower) else torch.tensor(0)
    most = grid.evaluate(upper) if upper is not None and _closed(spec, upper) else torch.tensor(whole)
    return least, most


def _closed(spec: AttentionSpec, bound: Expr | None) -> bool:
    """Whether every rank knows ``bound`` of every other: it is none, or made of positions and sizes that all have alike."""
    if bound is None:
        return True
    alike = {*spec.symbols[: spec.batch + 2], *PLACES}
    plain = expr.axes(bound) <= {"q"} and set(expr.symbols(bound)) <= alike
    return plain and not any(isinstance(n, Load) for n in expr.walk(bound))
