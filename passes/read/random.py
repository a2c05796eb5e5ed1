"""Random numbers, as dropout draws them: each is a function of its place in the tensor and of a seed (fuse.ir.philox).

The seed is drawn in the graph, from torch's generator, where the numbers were: once for all sites that read them. The
distribution is that of the model, the numbers are not.
"""

from __future__ import annotations

import sympy
import torch

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, apply, const
from fuse.passes.read.elements import Coords, Reader, arguments, dims, handles, op_name
from fuse.passes.read.pointwise import read
from fuse.passes.read.trace import Seed, Value
from fuse.report.reasons import Declined, RandomNumbers

# Random bits of a number in [0, 1) that eager draws in a dtype narrower than uniform's.
_DIGITS = {"bfloat16": 8, "float16": 11}


@handles("rand", "rand_like")
def _rand(r: Reader, v: Value, coords: Coords) -> Expr:
    number = _uniform(r, v, coords)
    if v.dtype in _DIGITS:
        steps = const(2.0 ** _DIGITS[v.dtype], "float32")
        whole = apply("floor", apply("mul", number, steps, dtype="float32"), dtype="float32")
        number = apply("div", whole, steps, dtype="float32")
    return apply("cast", number, dtype=v.dtype)


@handles("bernoulli")
def _bernoulli(r: Reader, v: Value, coords: Coords) -> Expr:
    p = arguments(v).get("p")
    probability = read(r, v.args[0], coords, "float32") if p is None else const(_rounded(p), "float32")
    drawn = apply("lt", _uniform(r, v, coords), probability, dtype="bool")
    return apply("where", drawn, const(1, v.dtype), const(0, v.dtype), dtype=v.dtype)


def _rounded(x: float) -> float:
    """As float32, so that a comparison in float32 and one in float64 agree."""
    return float(torch.tensor(x, dtype=torch.float32))


def _uniform(r: Reader, v: Value, coords: Coords) -> Expr:
    if arguments(v).get("generator") is not None:
        raise Declined(RandomNumbers(f"{op_name(v)} with a generator of its own"))
    if any(other.origin is v.origin for other in r.seeds if other is not v):
        raise Declined(RandomNumbers("an operation that draws several times"))
    if v not in r.seeds:
        r.seeds[v] = Seed(None, (), {}, v.meta.new_empty((1,), dtype=torch.int64), origin=v.origin)
    row, column = (sympy.Integer(0), sympy.Integer(0), *coords)[-2:]
    plane = r.space.flatten(coords[:-2], dims(v)[:-2])
    seed = r.load(r.seeds[v], (sympy.Integer(0),))
    return apply("uniform", seed, *map(r.expression, (plane, row, column)), dtype="float32")


def with_scaled_choices(weight: Expr) -> Expr:
    """where(kept, 1, 0) / 0.9 as where(kept, 1 / 0.9, 0): F.dropout divides its noise, and a kernel need not."""

    def rule(n: Expr) -> Expr | None:
        if isinstance(n, Apply) and n.op == "div" and isinstance(n.operands[1], Const):
            choice, divisor = n.operands[0], n.operands[1].value
            if isinstance(choice, Apply) and choice.op == "where" and divisor:
                values = [const(x.value / divisor, n.dtype) for x in choice.operands[1:] if isinstance(x, Const)]
                return apply("where", choice.operands[0], *values, dtype=n.dtype) if len(values) == 2 else None
        return None

    return expr.rewrite(weight, rule)
