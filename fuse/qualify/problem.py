"""Problems like a site's call: tensors that lie in memory as its operands do, with numbers that its spec can make sense of."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from fuse.ir import tile_map
from fuse.ir.expr import Const, Index, Load, axes, walk
from fuse.ir.spec import AttentionSpec
from fuse.kernel.example import extents
from fuse.ops.attention import parsed
from fuse.ops.warm import ExpectedCall
from fuse.targets import reference

# More than a tile of any target, and no multiple of one.
_LENGTH, _STEP = 149, 13
_MASKED, _SHARE = -3e4, 0.25  # what a mask that is added holds, and how many of its entries hold it
_SPAN = 40  # keys of one query, where a table says which
_IDS = 4  # documents, or whatever else positions are told apart by
_GAP = 8  # the most that strides are larger than in a dense tensor


@dataclass(frozen=True)
class Problem:
    """One call of a spec. ``terms``: how large those are of which gradients are sums."""

    spec: AttentionSpec
    operands: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    terms: float = 1.0


def small(call: ExpectedCall, wanted: Sequence[bool], seed: int, factor: float = 1.0) -> Problem:
    """A call with tails in every dimension, masked rows and, by ``factor``, scores of that size."""
    spec = parsed(call.spec)
    sizes = _small_sizes(spec, call.sizes)
    shapes = [_within(shape, t.shape) for shape, t in zip(extents(spec, sizes), call.operands, strict=True)]
    return _drawn(call, spec, sizes, shapes, wanted, seed, factor)


def whole(call: ExpectedCall, wanted: Sequence[bool]) -> Problem:
    """The call itself, its numbers drawn; boolean masks hide nothing, since nobody knows how much they will."""
    spec = parsed(call.spec)
    return _drawn(call, spec, call.sizes, [tuple(t.shape) for t in call.operands], wanted, 0, 1.0, masked=False)


def as_called(call: ExpectedCall, wanted: Sequence[bool]) -> Problem:
    """As ``whole``, with masks that hide something, and gaps in memory as large as those of the call."""
    spec = parsed(call.spec)
    return _drawn(call, spec, call.sizes, [tuple(t.shape) for t in call.operands], wanted, 0, 1.0, most=sys.maxsize)


def _small_sizes(spec: AttentionSpec, sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes that differ stay different, in their order, and equal ones equal; groups of heads become two."""
    groups = [n.value for n in walk(*spec.roots().values()) if isinstance(n, Const) and isinstance(n.value, int)]
    batch = [min(n, 2 * max([g for g in groups if 1 < g <= n], default=1)) for n in sizes[: spec.batch]]
    large = sorted({n for n in sizes[spec.batch :] if n > _LENGTH})
    return (*batch, *(n if n <= _LENGTH else _LENGTH + _STEP * large.index(n) for n in sizes[spec.batch :]))


def _within(shape: Sequence[int], given: Sequence[int]) -> tuple[int, ...]:
    """No dimension is longer than in the call: where data tell a place, nothing else tells how many there are."""
    return tuple(map(min, shape, given))


def _drawn(
    call: ExpectedCall, spec: AttentionSpec, sizes: tuple[int, ...], shapes: Sequence[tuple[int, ...]], wanted: Sequence[bool],
    seed: int, factor: float, masked: bool = True, most: int = _GAP,
) -> Problem:  # fmt: skip
    generator = torch.Generator(call.device).manual_seed(seed)
    use = map_used(spec)
    loads = [n for n in walk(*spec.roots().values()) if isinstance(n, Load)]
    scales = _scales(spec, factor)
    operands: list[Tensor] = []
    for i, (like, shape) in enumerate(zip(call.operands, shapes, strict=True)):
        if use is not None and i == use.load.operand:
            operands.append(reference.tile_map(use.tile_map, *of_map(use, spec, operands, sizes)))
            continue
        x = laid_out(like, shape, call.device, most)
        _fill(_once(x), [n for n in loads if n.operand == i], spec, shapes, generator, masked and not wanted[i])
        if i in scales:
            _once(x).mul_(scales[i])
        operands.append(x)
    for made, given in _read_twice(spec):
        if operands[made].shape == operands[given].shape and operands[made].dtype == operands[given].dtype:
            operands[made] = operands[given]
    query, key, value = (scales.get(load.operand, 1.0) for load in (spec.query, spec.key, spec.value))
    return Problem(spec, tuple(operands), tuple(sizes), value * max(query, key))


def _scales(spec: AttentionSpec, factor: float) -> dict[int, float]:
    """By what operands are multiplied, so that scores are ``factor`` times as large: one tensor may be queries and keys."""
    return {spec.query.operand: factor if spec.query.operand != spec.key.operand else math.sqrt(factor)}


def map_used(spec: AttentionSpec) -> tile_map.Use | None:
    """The map of tiles that the spec reads, by the operand that has it."""
    tiles = None if spec.mask is None else spec.mask.tiles
    use = None if tiles is None else tile_map.map_of(spec)
    return None if tiles is None or use is None else replace(use, load=tiles)


def of_map(
    use: tile_map.Use, spec: AttentionSpec, operands: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[list[Tensor], list[int]]:
    """The operands and sizes of a map, from those of the spec."""
    symbols = dict(zip(spec.symbols, sizes, strict=True))
    return [operands[j] for j in use.operands], [symbols[name] for name in use.symbols]


def _read_twice(spec: AttentionSpec) -> Iterable[tuple[int, int]]:
    """Operands that the visible score reads in the place of the score's: the same, computed in fewer steps under the mask."""
    if spec.mask is None:
        return ()
    score, visible = ([n.operand for n in walk(e) if isinstance(n, Load)] for e in (spec.score, spec.mask.visible))
    elsewhere = {n.operand for n in walk(spec.query, spec.key, spec.value, spec.mask.predicate) if isinstance(n, Load)}
    simpler = [i for i in dict.fromkeys(visible) if i not in score and i not in elsewhere]
    longer = [i for i in dict.fromkeys(score) if i not in visible and i not in elsewhere]
    return zip(simpler, longer, strict=True) if len(simpler) == len(longer) else ()


def laid_out(like: Tensor, shape: Sequence[int], device: torch.device, most: int = _GAP) -> Tensor:
    """A tensor of zeros of another shape that lies in memory as ``like`` does, with gaps up to ``most`` times its size."""
    strides = strides_as(like, shape, most)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    return torch.zeros(size, dtype=like.dtype, device=device).as_strided(list(shape), strides)


def strides_as(like: Tensor, shape: Sequence[int], most: int = _GAP) -> list[int]:
    """Of a tensor of another shape whose dimensions follow each other in memory as those of ``like`` do: with its gaps, as of a
    view of a larger tensor, and sharing what it shares."""
    strides, dense, before = [0] * len(shape), 1, 1
    for dim in sorted(range(len(shape)), key=lambda d: (like.stride(d), like.shape[d])):
        if like.stride(dim) == 0 or like.shape[dim] == 1:
            continue
        gap = min(Fraction(like.stride(dim), before), Fraction(most)) if before else Fraction(1)
        strides[dim] = max(1, math.ceil(dense * gap))
        dense, before = strides[dim] * shape[dim], like.stride(dim) * like.shape[dim]
    return strides


def _once(x: Tensor) -> Tensor:
    """Without the entries that share memory with others."""
    return x[tuple(slice(0, 1 if step == 0 else None) for step in x.stride())]


def _fill(
    x: Tensor, loads: Sequence[Load], spec: AttentionSpec, shapes: Sequence[tuple[int, ...]], generator: torch.Generator,
    masked: bool,
) -> None:  # fmt: skip
    """Numbers in ``x`` that its ``loads`` can make sense of."""
    of_positions = any(axes(n) & {"q", "k"} for n in loads)
    if x.dtype == torch.bool:
        x.copy_(torch.rand(x.shape, generator=generator, device=x.device) > (_SHARE if masked else -1))
        _hide_a_row(x, loads, not masked)
    elif x.is_floating_point():
        x.copy_(torch.randn(x.shape, generator=generator, device=x.device))
        if masked and _adds_a_mask(loads, spec):
            x.masked_fill_(torch.rand(x.shape, generator=generator, device=x.device) < _SHARE, _MASKED)
            _hide_a_row(x, loads, _MASKED)
    elif (upper := _limits_keys(loads, spec)) is not None:
        for dim in _of_queries(loads):
            along = torch.arange(x.shape[dim], device=x.device) // _SPAN * _SPAN + _SPAN * upper
            x.copy_(along.view([-1 if d == dim else 1 for d in range(x.dim())]))
    else:
        high = _places(loads, spec, shapes) or (_IDS if of_positions else _LENGTH)
        numbers = torch.randint(0, high, tuple(x.shape), generator=generator, device=x.device)
        x.copy_(numbers.sort(-1).values if of_positions and x.dim() else numbers)


def _hide_a_row(x: Tensor, loads: Iterable[Load], hidden: float | bool) -> None:
    for dim in [d for d in _of_queries(loads) if x.shape[d] > 1][:1]:
        x.select(dim, 1).fill_(hidden)


def _of_queries(loads: Iterable[Load]) -> list[int]:
    """Dimensions of queries."""
    return [d for n in loads for d, coord in enumerate(n.coords) if isinstance(coord, Index) and coord.axis == "q"]


def _limits_keys(loads: Sequence[Load], spec: AttentionSpec) -> bool | None:
    """Whether what is read of each query is where its keys end; False: where they begin; None: neither."""
    for upper, root in ((True, spec.mask and spec.mask.upper), (False, spec.mask and spec.mask.lower)):
        if root and any(n in loads and "q" in axes(n) for n in walk(root)):
            return upper
    return None


def _adds_a_mask(loads: Sequence[Load], spec: AttentionSpec) -> bool:
    """Is it read by the score alone, at every key?"""
    matrices = (spec.query, spec.key, spec.value)
    others = set(walk(spec.weight, *spec.extra_logits))
    return all("k" in axes(n) and n not in matrices and n not in others for n in loads)


def _places(loads: Sequence[Load], spec: AttentionSpec, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """How many places there are where what is read says at which other tensors are read; None where it says nothing of that."""
    found = [
        shapes[n.operand][dim]
        for n in walk(*spec.roots().values()) if isinstance(n, Load)
        for dim, coord in enumerate(n.coords) if any(inner in loads for inner in walk(coord))
    ]  # fmt: skip
    return min(found, default=None)
