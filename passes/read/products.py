"""Products: a sum over one index of one tensor times another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import sympy

from fuse.passes.read import pointwise
from fuse.passes.read.elements import PRODUCTS, Coords, Opaque, Reader, dims, op_name
from fuse.passes.read.trace import Value
from fuse.report.reasons import Declined, UnsupportedType

Side: TypeAlias = tuple[Value, Coords]


@dataclass(frozen=True)
class Product:
    """sum over t of left[..., t] * right[..., t] as the two operands' values and coordinates."""

    value: Value
    sides: tuple[Side, Side]
    over: sympy.Symbol


def product_of(r: Reader, found: Opaque, over: str) -> Product | None:
    """The two sides of a matrix product or of a sum of products; ``over``: the name of the index that is summed over."""
    coords = tuple(r.index(c) for c in found.coords)
    name, v = found.name, found.value
    if name in PRODUCTS:
        left, right = v.args[1:3] if name in ("baddbmm", "addmm") else v.args[:2]
        if left.dtype != right.dtype:  # tracing lets it pass, eager refuses it
            raise Declined(UnsupportedType(f"a product of {left.dtype} and {right.dtype}"))
        t = r.space.add(over, dims(left)[-1])
        batch, (i, j) = coords[:-2], coords[-2:]
        return Product(v, ((left, (*batch, i, t)), (right, (*batch, t, j))), t)
    if name == "sum" and op_name(v.args[0]) == "mul" and (at := _summed(r, v, coords, over)):
        factors = [x for x in v.args[0].args if isinstance(x, Value)]
        if len(factors) == 2:
            a, b = ((x, pointwise.broadcast(at[0], x)) for x in factors)
            return Product(v, (a, b), at[1])
    return None


def _summed(r: Reader, v: Value, coords: Coords, over: str) -> tuple[Coords, sympy.Symbol] | None:
    source = dims(v.args[0])
    axes = v.args[1] if len(v.args) > 1 else []
    if not isinstance(axes, (list, tuple)) or len(axes) != 1:
        return None
    axis, keepdim = axes[0] % len(source), len(coords) == len(source)
    t = r.space.add(over, source[axis])
    return (*coords[:axis], t, *coords[axis + keepdim :]), t
