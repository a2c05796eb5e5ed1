"""What proofs are made with: expressions in z3, and grids of constants on which PyTorch is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import sympy
import torch
import z3
from hypothesis import settings

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Load, const
from fuse.ir.operators import OPERATORS

# ------------------------------------------------------------------------------------------------------ from Expr to z3

FLOAT_SORTS = {"float16": z3.Float16(), "bfloat16": z3.FPSort(8, 8)}
INT_BITS = {"int64": 64, "int32": 32, "uint8": 8}


def solved(e: Expr) -> Any:
    """``e`` in z3: loads, symbols and scores are free variables; integers are bit vectors, which wrap."""
    if isinstance(e, Const):
        if e.dtype == "bool":
            return z3.BoolVal(e.value)
        if e.dtype in FLOAT_SORTS:
            return z3.FPVal(e.value, FLOAT_SORTS[e.dtype])
        return z3.BitVecVal(int(e.value), INT_BITS[e.dtype])
    if not isinstance(e, Apply):
        name = f"{e.dtype} {e}"
        if e.dtype == "bool":
            return z3.Bool(name)
        return z3.FP(name, FLOAT_SORTS[e.dtype]) if e.dtype in FLOAT_SORTS else z3.BitVec(name, INT_BITS[e.dtype])
    return _operator(e, [solved(x) for x in e.operands])


def _operator(e: Apply, args: list[Any]) -> Any:
    if e.operands[-1].dtype in FLOAT_SORTS and e.op in _OF_FLOATS:
        return _OF_FLOATS[e.op](*args)
    return _OF_INTEGERS[e.op](*args)


def _below(op: str, signed: Callable[[Any, Any], Any], unsigned: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: unsigned(a, b) if a.size() == 8 else signed(a, b)


_lt = _below("lt", lambda a, b: a < b, z3.ULT)
_OF_INTEGERS: dict[str, Callable[..., Any]] = {
    "and": lambda a, b: z3.And(a, b) if z3.is_bool(a) else a & b, "or": lambda a, b: z3.Or(a, b) if z3.is_bool(a) else a | b,
    "xor": lambda a, b: z3.Xor(a, b) if z3.is_bool(a) else a ^ b, "not": lambda a: z3.Not(a) if z3.is_bool(a) else ~a,
    "where": z3.If, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "minimum": lambda a, b: z3.If(_lt(b, a), b, a), "maximum": lambda a, b: z3.If(_lt(a, b), b, a),
    "lt": _lt, "gt": lambda a, b: _lt(b, a), "le": lambda a, b: z3.Not(_lt(b, a)), "ge": lambda a, b: z3.Not(_lt(a, b)),
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "abs": lambda a: z3.If(a < 0, -a, a),
}  # fmt: skip
_NEAREST = z3.RNE()
_OF_FLOATS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: z3.fpAdd(_NEAREST, a, b), "sub": lambda a, b: z3.fpSub(_NEAREST, a, b),
    "mul": lambda a, b: z3.fpMul(_NEAREST, a, b), "lt": z3.fpLT, "le": z3.fpLEQ, "gt": z3.fpGT, "ge": z3.fpGEQ,
    "eq": z3.fpEQ, "ne": z3.fpNEQ,
    "minimum": lambda a, b: z3.If(z3.Or(z3.fpLT(a, b), z3.fpIsNaN(a)), a, b),
    "maximum": lambda a, b: z3.If(z3.Or(z3.fpGT(a, b), z3.fpIsNaN(a)), a, b),
}  # fmt: skip


def prove(claim: Any) -> None:
    """Fails with an example unless ``claim`` holds for all values of its variables."""
    solver = z3.Solver()
    solver.set("timeout", 20_000)
    solver.add(z3.Not(claim))
    outcome = solver.check()
    assert outcome == z3.unsat, f"{claim}: {solver.model() if outcome == z3.sat else outcome}"


def same(a: Expr, b: Expr) -> None:
    """Fails unless the two are equal bit for bit, whatever their leaves are. (z3 has one NaN, and two zeros.)"""
    assert a is not b and a.dtype == b.dtype
    prove(solved(a) == solved(b))


@cache
def free(dtype: str, count: int) -> tuple[Expr, ...]:
    return tuple(Load(dtype, i, ()) for i in range(count))


P, Q, R = free("bool", 3)
YES, NO = const(True, "bool"), const(False, "bool")
NUMBERS = ("float16", "bfloat16", "int64", "int32", "uint8")
Instances = Iterator[tuple[str, Sequence[Expr], str]]


# --------------------------------------------------------------------------------------------- on constants, by PyTorch

FLOAT_GRID = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    1.9,
    -2.5,
    3e4,
    65504.0,
    -7e4,
    -1e9,
    3.3e38,
    torch.finfo(torch.float32).min,
    math.inf,
    -math.inf,
    math.nan,
)
INT_GRID = (0, 1, -1, 2, 7, -8, 100, 127, -128, 200, 255, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))


def grid(dtype: str) -> list[Const]:
    if dtype == "bool":
        return [YES, NO]
    if dtype in expr.FLOATS:
        return [const(x, dtype) for x in FLOAT_GRID]
    limits = torch.iinfo(getattr(torch, dtype))
    return [const(x, dtype) for x in INT_GRID if limits.min <= x <= limits.max]


def torch_value(e: Expr) -> torch.Tensor:
    """A tree of constants as PyTorch computes it, on tensors of their dtypes."""
    if isinstance(e, Const):
        return torch.tensor(e.value, dtype=getattr(torch, e.dtype))
    assert isinstance(e, Apply)
    args = [torch_value(x) for x in e.operands]
    dtype: torch.dtype = getattr(torch, e.dtype)
    return args[0].to(dtype) if e.op == "cast" else OPERATORS[e.op].function(*args).to(dtype)


def agrees(e: Expr, found: Expr) -> None:
    expected, got = torch_value(e), torch_value(found)
    assert expected.dtype == got.dtype and repr(expected.item()) == repr(got.item()), (
        f"{e}: {got.item()}, not {expected.item()}"
    )


def evaluated(e: Expr, leaves: dict[Expr, torch.Tensor]) -> torch.Tensor:
    """``e`` as eager PyTorch rounds it, on tensors for its leaves; Python numbers stay unrounded until they are used."""
    known: dict[Expr, torch.Tensor] = dict(leaves)
    for n in expr.walk(e):
        if n in known:
            continue
        if isinstance(n, Const):
            known[n] = torch.tensor(n.value, dtype=torch.float64 if n.dtype in expr.FLOATS else getattr(torch, n.dtype))
        else:
            assert isinstance(n, Apply)
            args, dtype = [known[a] for a in n.operands], getattr(torch, n.dtype)
            known[n] = args[0].to(dtype) if n.op == "cast" else OPERATORS[n.op].function(*args).to(dtype)
    return known[e]


FLOAT_DTYPES = ("float16", "bfloat16", "float32")
INTEGERS, HALVES = ("int64", "int32", "uint8"), ("float16", "bfloat16")
repeatable = settings(derandomize=True, deadline=None)


def whole(e: Any, values: dict[Any, int]) -> int:
    return int(sympy.sympify(e).subs(values))
