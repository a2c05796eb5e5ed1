"""How elements of pointwise ATen operations and of factories are read."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from fuse.ir import expr
from fuse.ir.expr import COMPARISONS, Const, Expr, apply, const
from fuse.ir.index import IndexExpr
from fuse.ir.operators import OPERATORS
from fuse.passes.read.elements import Coords, Reader, arguments, as_index, dims, handles, op_name
from fuse.passes.read.empty_rows import safe_softmax
from fuse.passes.read.trace import Value

_BY_ATEN = {aten: row.name for row in OPERATORS.values() for aten in row.aten}
LOGICAL = {aten: name for aten, name in _BY_ATEN.items() if aten.startswith(("logical_", "bitwise_"))}
SAME = {aten: name for aten, name in _BY_ATEN.items() if aten not in LOGICAL and name not in COMPARISONS}


def broadcast(coords: Coords, value: Value) -> Coords:
    """Coordinates of ``value`` in a result that it was broadcast to."""
    own = dims(value)
    return tuple(sympy.Integer(0) if n == 1 else c for c, n in zip(coords[len(coords) - len(own) :], own, strict=True))


def read(r: Reader, x: Any, coords: Coords, dtype: str) -> Expr:
    """An operand of a pointwise operation, tensor or number, in ``dtype``."""
    if isinstance(x, Value):
        return cast(r.element(x, broadcast(coords, x)), dtype)
    if isinstance(x, torch.SymInt):
        return cast(r.expression(as_index(x)), dtype)
    return const(float(x) if dtype in expr.FLOATS else x, dtype)


def cast(e: Expr, dtype: str) -> Expr:
    if dtype == "bool" and e.dtype != "bool":
        return apply("ne", e, const(0, e.dtype), dtype="bool")
    return apply("cast", e, dtype=dtype)


def common_dtype(*xs: Any) -> str:
    """PyTorch's type promotion for a comparison."""
    dtype = None
    for x in xs:
        x = x.meta if isinstance(x, Value) else x
        x = 1 if isinstance(x, torch.SymInt) else x
        dtype = x if dtype is None else torch.result_type(dtype, x) if not isinstance(dtype, torch.dtype) else dtype
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else _name(dtype)


def _name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.") if isinstance(x, torch.Tensor) else "float32"


@handles(*SAME)
def _same(r: Reader, v: Value, coords: Coords) -> Expr:
    operator = SAME[op_name(v)]
    operands = [x for x in v.args if isinstance(x, (Value, int, float, bool, torch.SymInt))]
    if operator == "mul" and v.dtype == "bool":
        operator = "and"
    if operator == "pow" and operands[1] == 2:
        x = read(r, operands[0], coords, v.dtype)
        return apply("mul", x, x, dtype=v.dtype)
    if operator == "floordiv" and v.dtype in expr.FLOATS:
        return r.load(v, coords)
    return apply(operator, *(read(r, x, coords, v.dtype) for x in operands[: OPERATORS[operator].arity]), dtype=v.dtype)


@handles("add", "sub", "rsub")
def _add(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    x, y = a["self"], a["other"]
    left, right = read(r, x, coords, v.dtype), read(r, y, coords, v.dtype)
    kept, scaled = (right, left) if op_name(v) == "rsub" else (left, right)
    scaled = apply("mul", const(a.get("alpha", 1), v.dtype), scaled, dtype=v.dtype)
    if v.dtype == "bool":
        return apply("or", kept, scaled, dtype="bool")
    return apply("add" if op_name(v) == "add" else "sub", kept, scaled, dtype=v.dtype)


@handles("div")
def _div(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    mode = a.get("rounding_mode")
    if mode == "trunc" and v.dtype not in expr.FLOATS:
        return r.load(v, coords)
    operator, dtype = "floordiv" if mode == "floor" else "div", v.dtype
    if mode is not None and dtype in ("bfloat16", "float16") and not isinstance(a["other"], Value):
        dtype = "float32"  # a quotient by a number is cut before it is rounded
    quotient = apply(
        operator, cast(read(r, a["self"], coords, v.dtype), dtype), read(r, a["other"], coords, dtype), dtype=dtype
    )
    return cast(apply("trunc", quotient, dtype=dtype) if mode == "trunc" else quotient, v.dtype)


@handles(*COMPARISONS)
def _compare(r: Reader, v: Value, coords: Coords) -> Expr:
    x, y = v.args[:2]
    dtype = common_dtype(x, y)
    a, b = read(r, x, coords, dtype), read(r, y, coords, dtype)
    if dtype == "bool":
        same = apply("not", apply("xor", a, b, dtype="bool"), dtype="bool")
        return {"eq": same, "ne": apply("not", same, dtype="bool")}.get(op_name(v)) or r.load(v, coords)
    if dtype in expr.INTS:
        a, b = cast(a, "int64"), cast(b, "int64")
        if (decided := _decided(r, op_name(v), r.index(a), r.index(b))) is not None:
            return const(decided, "bool")
    return apply(op_name(v), a, b, dtype="bool")


def _decided(r: Reader, name: str, a: IndexExpr, b: IndexExpr) -> bool | None:
    """The outcome of a comparison of integers where it is the same at every entry."""
    low, high = {"le": (b - a, a - b - 1), "lt": (b - a - 1, a - b), "ge": (a - b, b - a - 1), "gt": (a - b - 1, b - a)}.get(
        name, (None, None)
    )
    if low is not None and high is not None:
        return True if r.space.nonnegative(low) else False if r.space.nonnegative(high) else None
    if sympy.expand(a - b) == 0:
        return name == "eq"
    apart = r.space.nonnegative(a - b - 1) or r.space.nonnegative(b - a - 1)
    return (name == "ne") if apart else None


@handles(*LOGICAL)
def _logical(r: Reader, v: Value, coords: Coords) -> Expr:
    if v.dtype != "bool":
        return r.load(v, coords)
    return apply(LOGICAL[op_name(v)], *(read(r, x, coords, "bool") for x in v.args), dtype="bool")


@handles("isnan", "isinf")
def _test(r: Reader, v: Value, coords: Coords) -> Expr:
    return apply(op_name(v), r.element(v.args[0], coords), dtype="bool")


@handles("where")
def _where(r: Reader, v: Value, coords: Coords) -> Expr:
    condition, x, y = v.args
    if isinstance(condition, Value) and isinstance(y, Value) and (softmax := safe_softmax(condition, x, y)) is not None:
        return r.element(softmax, coords)
    return apply("where", read(r, condition, coords, "bool"), read(r, x, coords, v.dtype), read(r, y, coords, v.dtype),
                 dtype=v.dtype)  # fmt: skip


@handles("masked_fill")
def _masked_fill(r: Reader, v: Value, coords: Coords) -> Expr:
    x, mask, fill = v.args
    return apply("where", read(r, mask, coords, "bool"), read(r, fill, coords, v.dtype), read(r, x, coords, v.dtype),
                 dtype=v.dtype)  # fmt: skip


@handles("relu", "hardtanh")
def _saturating(r: Reader, v: Value, coords: Coords) -> Expr:
    """No maximum: on the bounds the derivative is 0, and what is NaN stays so."""
    a = arguments(v)
    out = x = r.element(a["self"], coords)
    for condition, bound in (("le", a.get("min_val", 0)), ("ge", a.get("max_val"))):
        if bound is not None:
            limit = const(bound, v.dtype)
            out = apply("where", apply(condition, x, limit, dtype="bool"), limit, out, dtype=v.dtype)
    return out


@handles("clamp", "clamp_min", "clamp_max")
def _clamp(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    low, high = a.get("min"), a.get("max")
    out = read(r, a["self"], coords, v.dtype)
    if low is not None:
        out = apply("maximum", out, read(r, low, coords, v.dtype), dtype=v.dtype)
    if high is not None:
        out = apply("minimum", out, read(r, high, coords, v.dtype), dtype=v.dtype)
    return out


@handles("nan_to_num")
def _nan_to_num(r: Reader, v: Value, coords: Coords) -> Expr:
    a, limits = arguments(v), torch.finfo(v.meta.dtype) if v.dtype in expr.FLOATS else None
    x = read(r, a["self"], coords, v.dtype)
    if limits is None:
        return x
    out = apply("where", apply("isnan", x, dtype="bool"), const(a["nan"] or 0.0, v.dtype), x, dtype=v.dtype)
    for infinity, given, limit in ((math.inf, a["posinf"], limits.max), (-math.inf, a["neginf"], limits.min)):
        hit = apply("eq", x, const(infinity, v.dtype), dtype="bool")
        out = apply("where", hit, const(limit if given is None else given, v.dtype), out, dtype=v.dtype)
    return out


@handles("_to_copy", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", "_conj", "to")
def _convert(r: Reader, v: Value, coords: Coords) -> Expr:
    return cast(r.element(v.args[0], coords), v.dtype)


@handles("copy")
def _copy(r: Reader, v: Value, coords: Coords) -> Expr:
    return read(r, v.args[1], coords, v.dtype)


@handles("full", "full_like", "new_full", "fill")
def _full(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    return _held(read(r, a["fill_value"] if "fill_value" in a else a["value"], (), v.dtype))


def _held(e: Expr) -> Expr:
    """A number in a tensor, which is of the tensor's dtype, as one in a program is not."""
    return const(expr.rounded(e.value, e.dtype), e.dtype) if isinstance(e, Const) and e.dtype in expr.FLOATS else e


@handles("zeros", "zeros_like", "new_zeros", "zero")
def _zeros(r: Reader, v: Value, coords: Coords) -> Expr:
    return const(0, v.dtype)


@handles("ones", "ones_like", "new_ones")
def _ones(r: Reader, v: Value, coords: Coords) -> Expr:
    return const(1, v.dtype)


@handles("scalar_tensor")
def _scalar(r: Reader, v: Value, coords: Coords) -> Expr:
    return _held(read(r, v.args[0], (), v.dtype))


@handles("arange")
def _arange(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    start, step = a.get("start", 0), a.get("step", 1)
    if isinstance(start, float) or isinstance(step, float):
        return r.load(v, coords)
    return cast(r.expression(as_index(start) + as_index(step) * coords[0]), v.dtype)


@handles("tril", "triu")
def _triangle(r: Reader, v: Value, coords: Coords) -> Expr:
    offset = as_index(arguments(v).get("diagonal", 0))
    row, column = coords[-2], coords[-1]
    low = op_name(v) == "tril"
    kept = r.at_most(column, row + offset) if low else r.at_most(row + offset, column)
    return apply("where", kept, r.element(v.args[0], coords), const(0, v.dtype), dtype=v.dtype)


@handles("eye")
def _eye(r: Reader, v: Value, coords: Coords) -> Expr:
    return cast(apply("eq", r.expression(coords[0]), r.expression(coords[1]), dtype="bool"), v.dtype)
