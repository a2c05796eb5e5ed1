"""One suite for whatever computes with ranges: operations, and all ranges between the values of a grid as their operands.

A library is a function of a case and of a range for each operand, whose ends are tensors; it gives the ranges of the results.
Each must hold every value of the operation, as PyTorch computes it: integers that leave their dtype wrap, floats are rounded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from fuse.ir.expr import COMPARISONS, DTYPES, FLOATS, INTS, Apply, Load, index
from fuse.ir.interval import RULES, Range
from fuse.ir.operators import OPERATORS
from fuse.kernel.ranges import RangeWriter

Library = Callable[["Case", Sequence[Range]], Range]

_SMALL = 7
# From 2^53 on float64 has not every integer, from 2^60 on kernels for GPUs know no bounds.
_LARGE = (-(2**59), 2**52 + 1, 2**59)
_LARGEST = torch.finfo(torch.float32).max
_REALS = (
    -math.inf, -_LARGEST, -65520.0, -65504.0, -2.0, -1.0, -0.7, -0.0, 0.0, 0.5, 2.5, 257.0, 7e4, 1e28, _LARGEST, math.inf,
    math.nan,
)  # fmt: skip
# Where conversions to other dtypes wrap or round; looked at where there is one operand.
_EDGES = (
    -(2**31) - 1, -(2**31), -(2**15) - 1, -(2**15), -129, -128, -9, 127, 128, 200, 255, 256, 257, 2**15 - 1, 2**15, 2**24 + 1,
    2**31 - 1, 2**31, 2**62,
)  # fmt: skip
_REAL_EDGES = (-1e9, -128.9, -1.5, -0.5, 0.3, 1.0, 1.9, 3.0, 127.9, 128.0, 255.9, 3e4, 2.0**31, 2.0**63)
_ROUNDS = ("floor", "ceil", "trunc", "round")
# Of these, small ranges give no more than the smallest and the largest value.
_TIGHT = ("add", "sub", "neg", "mul", "abs", "minimum", "maximum", "floordiv", "where", "cast", "and", "or", "xor", "not")


@dataclass(frozen=True)
class Case:
    op: str
    sources: tuple[str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}({', '.join(self.sources)}) as {self.dtype}"

    @property
    def node(self) -> Apply:
        return Apply(self.dtype, self.op, tuple(Load(s, i, (index("q"), index("k"))) for i, s in enumerate(self.sources)))


def _case(op: str, dtype: str) -> Case:
    sources = ("bool", dtype, dtype) if op == "where" else (dtype,) * OPERATORS[op].arity
    return Case(op, sources, "bool" if op in COMPARISONS else dtype)


CASES = [_case(op, dtype) for op, dtype in RULES] + [Case("cast", (s,), t) for s in DTYPES for t in DTYPES]

_ARITHMETIC = ("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "floordiv", "mod")
# What kernels compute with ranges, on both targets.
INTEGERS = [
    *(_case(op, "int64") for op in (*_ARITHMETIC, *COMPARISONS, "where")),
    *(_case(op, "bool") for op in ("and", "or", "xor", "not", "eq", "ne", "where")),
    *(Case("cast", ("int64",), t) for t in (*INTS[1:], "bool")),
    *(Case("cast", ("bool",), t) for t in INTS),
]
_KERNEL_FLOATS = ("float32", "bfloat16", "float16")
REALS = [
    *(_case(op, t) for t in _KERNEL_FLOATS for op in ("add", "sub", "neg", "minimum", "maximum", "where", *COMPARISONS)),
    *(Case("cast", (s,), t) for s in ("int64", "bool", "float32") for t in _KERNEL_FLOATS if s != t),
]


NAMES = "abc"


def written(writer: RangeWriter, case: Case) -> str:
    """What a kernel calls the result, where its operands are called NAMES."""
    writer._known.update(zip(case.node.operands, NAMES, strict=False))
    return writer.range(case.node)


# ------------------------------------------------------------------------------------------------------------- ranges


@cache
def _grid(dtype: str, edges: bool) -> Tensor:
    if dtype == "bool":
        return torch.tensor([False, True])
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if dtype in FLOATS:
        reals = sorted((*_REALS[:-1], *(_REAL_EDGES if edges else ())))
        return torch.tensor([*reals, math.nan], dtype=torch.float64).to(torch_dtype)
    limits = torch.iinfo(torch_dtype)
    least, most = limits.min, limits.max
    inner = (least + 1, *range(-_SMALL, _SMALL + 1), *_LARGE, most - 1) if dtype == "int64" else (-100, -2, -1, 0, 1, 2, 100)
    values = {least, *inner, *(_EDGES if edges else ()), most}
    return torch.tensor(sorted(x for x in values if least <= x <= most), dtype=torch_dtype)


def _grids(case: Case) -> list[Tensor]:
    """For each operand its values in ascending order, NaN behind them."""
    return [_grid(dtype, len(case.sources) == 1) for dtype in case.sources]


def _spans(values: Tensor) -> list[tuple[int, int]]:
    return list(itertools.combinations_with_replacement(range(len(values)), 2))


@lru_cache(maxsize=2)
def operands(case: Case) -> tuple[Range, ...]:
    """All combinations of ranges: their ends are int64, of truth values too, or float64."""
    sides = [torch.tensor(_spans(values)) for values in _grids(case)]
    chosen = torch.cartesian_prod(*(torch.arange(len(s)) for s in sides)).reshape(-1, len(sides)).unbind(-1)
    return tuple(_range_of(values, s[c]) for values, s, c in zip(_grids(case), sides, chosen, strict=True))


def _range_of(values: Tensor, spans: Tensor) -> Range:
    """Of what holds NaN, anything is said to be possible."""
    wide = values.double() if values.is_floating_point() else values.long()
    nan = wide[spans[:, 1]].isnan()
    ends = [torch.where(nan, limit, wide[x]) for x, limit in zip(spans.unbind(-1), (-math.inf, math.inf), strict=True)]
    return Range(*(ends if values.is_floating_point() else [wide[x] for x in spans.unbind(-1)]), nan)


@lru_cache(maxsize=2)
def expected(case: Case) -> Range:
    """The smallest and the largest value of each combination, and whether one is NaN, by looking at all of them."""
    values, defined = _values(case)
    values = values.double() if values.is_floating_point() else values.long()
    least, most = (-math.inf, math.inf) if values.is_floating_point() else (-(2**63), 2**63 - 1)
    nan = values.isnan() & defined
    known = defined & ~nan
    low, high = torch.where(known, values, most), torch.where(known, values, least)
    for axis, points in enumerate(_grids(case)):
        parts = [(axis, first, last - first + 1) for first, last in _spans(points)]
        low = torch.stack([low.narrow(*p).amin(axis) for p in parts], axis)
        high = torch.stack([high.narrow(*p).amax(axis) for p in parts], axis)
        nan = torch.stack([nan.narrow(*p).any(axis) for p in parts], axis)
    return Range(low.flatten(), high.flatten(), nan.flatten())


def _values(case: Case) -> tuple[Tensor, Tensor]:
    """The operation at all points of the grids, and where it is defined."""
    columns = [g.reshape([-1 if i == j else 1 for j in range(len(case.sources))]) for i, g in enumerate(_grids(case))]
    dtype: torch.dtype = getattr(torch, case.dtype)
    if case.op == "cast":
        return columns[0].to(dtype), torch.ones_like(columns[0], dtype=torch.bool)
    defined = torch.ones(torch.broadcast_shapes(*(c.shape for c in columns)), dtype=torch.bool)
    if case.op in ("floordiv", "mod"):
        x, y = torch.broadcast_tensors(*columns)
        defined = (y != 0) & ((y != -1) | (x != torch.iinfo(x.dtype).min))
        columns = [x, torch.where(defined, y, 1)]
    return OPERATORS[case.op].function(*columns).to(dtype), defined


# ------------------------------------------------------------------------------------------------------------- claims


def check(case: Case, library: Library, at_most: int | None = None) -> None:
    """Fails unless every value lies in its range, and small ranges give no more. ``at_most``: combinations that are tried."""
    count = len(operands(case)[0].low)
    step = 1 if at_most is None else count // at_most | 1
    args, values = [_every(step, r) for r in operands(case)], _every(step, expected(case))
    found = library(case, args)
    # functions of floats are not the same to the last bit everywhere
    slack = 1e-6 if OPERATORS[case.op].rising is not None and case.op not in _ROUNDS else 0.0
    below, above = (torch.where(x.isfinite(), x.abs() * slack, 0).to(x.dtype) for x in (values.low, values.high))
    _all(case, args, found, (found.low - below <= values.low) & (values.high <= found.high + above) & (found.nan | ~values.nan))
    if case.op in COMPARISONS:
        _all(case, args, found, (found.low == values.low) | ~_is_told_apart(case, args))
    if _is_tight(case):
        exact = (found.low == values.low) & (found.high == values.high)
        _all(case, args, found, exact | ~_is_small(case, args))


def _is_tight(case: Case) -> bool:
    """Not floats, which round, nor uint8, where small integers wrap, nor truth values chosen by one that may be either."""
    if {*case.sources, case.dtype} & {*FLOATS, "uint8"}:
        return False
    return case.op in COMPARISONS or (case.op in _TIGHT and (case.op, case.dtype) != ("where", "bool"))


def _every(step: int, r: Range) -> Range:
    return Range(r.low[::step], r.high[::step], r.nan[::step])


def _is_told_apart(case: Case, args: Sequence[Range]) -> Tensor:
    """Comparisons of small integers, and of any floats, are said to hold wherever they do; NaN may differ from NaN alone."""
    if case.sources[0] not in FLOATS:
        return _is_small(case, args)
    return ~(args[0].nan | args[1].nan) | torch.tensor(case.op != "ne")


def _is_small(case: Case, args: Sequence[Range]) -> Tensor:
    small = torch.ones_like(args[0].nan)
    for r in args:
        small &= (r.low >= -_SMALL) & (r.high <= _SMALL)
    return small & (args[1].low > 0) if case.op == "floordiv" else small


def _all(case: Case, args: Sequence[Range], found: Range, holds: Tensor) -> None:
    if not holds.all():
        at = int((~holds).nonzero()[0])
        texts = [f"[{r.low[at].item()}, {r.high[at].item()}]{' or NaN' * bool(r.nan[at])}" for r in (*args, found)]
        raise AssertionError(f"{case}: of {', '.join(texts[:-1])} it gives {texts[-1]}")
