"""The operators of expressions: one table, a row for each, with all that anybody needs to know about it.

Adding an operator is a row here; what is proved of every row is in tests/test_operators.py. Semantics are PyTorch's: floordiv
and mod round towards minus infinity, round goes to the nearest even number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.ir import philox
from fuse.ir.expr import COMPARISONS, Apply, Const, Expr, apply, const, op

# How tightly an operator binds where it is written with a sign; a function's call binds tightest.
_OR, _AND, _NOT, _COMPARISON, _SUM, _PRODUCT, _NEGATIVE, _POWER, CALL = range(9)

# d n / d operand, from the node n; None: zero everywhere, or a jump.
Partial = Callable[[Apply], Expr | None]


@dataclass(frozen=True)
class Operator:
    """
    function     what eager computes, on tensors; "cast" and "uniform" have parameters of their own
    arity        number of operands
    aten         names of the ATen operations that are this one, element by element
    sign, binds  how people read it: the sign between, or before, its operands, and how tightly that binds; "": as a call
    partials     its derivative by each operand; None: it has none, or chooses between its operands
    cpp, triton  its text, with the operands' texts in the place of {0}, {1}, …; "": the writer has a rule for it
    triton_real  the same for floats, where that is another text
    rising       a function of one operand that never decreases where that is not less; None: it may
    finite       finite wherever its operands are ordinary numbers
    costly       takes longer than to load a number
    jumps        its value may jump where a float that it is computed of changes by a rounding
    wide_number  PyTorch gives it a number on its right in float32 beside a 16-bit tensor; to others it is of the tensor's dtype
    """

    name: str
    function: Callable[..., Tensor]
    arity: int = 1
    aten: tuple[str, ...] = ()
    sign: str = ""
    binds: int = CALL
    partials: tuple[Partial, ...] | None = None
    cpp: str = ""
    triton: str = ""
    triton_real: str = ""
    rising: float | None = None
    finite: bool = False
    costly: bool = False
    jumps: bool = False
    wide_number: bool = False


def _function(name: str, function: Callable[[Tensor], Tensor], partial: Partial, triton: str = "", **facts: object) -> Operator:
    """A function of one float."""
    text = triton or f"tl.{name}({{0}})"
    return Operator(name, function, 1, (name,), partials=(partial,), cpp=f"f_{name}({{0}})", triton=text, **facts)  # type: ignore[arg-type]


def _between(
    name: str, function: Callable[[Tensor, Tensor], Tensor], sign: str, binds: int, target: str = "", **facts: object
) -> Operator:
    """An operator that people write between its operands, and so do targets, perhaps with another sign."""
    text = f"{{0}} {target or sign} {{1}}"
    return Operator(name, function, 2, sign=sign, binds=binds, cpp=text, triton=text, **facts)  # type: ignore[arg-type]


def _compared(name: str, function: Callable[[Tensor, Tensor], Tensor], sign: str) -> Operator:
    return _between(name, function, sign, _COMPARISON, finite=True, jumps=True, aten=(name,))


def _logical(name: str, function: Callable[[Tensor, Tensor], Tensor], sign: str, binds: int, target: str) -> Operator:
    return _between(name, function, sign, binds, target, finite=True, aten=(f"logical_{name}", f"bitwise_{name}"))


def _one(n: Apply) -> Expr:
    return const(1.0, n.dtype)


def _minus_one(n: Apply) -> Expr:
    return const(-1.0, n.dtype)


def _nothing(n: Apply) -> None:
    return None


def _of_quotient(n: Apply) -> Expr:
    return op("neg", op("div", n, n.operands[1]))


def _of_base(n: Apply) -> Expr | None:
    x, y = n.operands
    if isinstance(y, Const):
        return None if y.value == 0 else op("mul", y, op("pow", x, y.value - 1))
    slope = op("mul", y, op("pow", x, op("sub", y, 1.0)))
    return apply("where", op("eq", y, 0.0), const(0.0, n.dtype), slope, dtype=n.dtype)


def _of_exponent(n: Apply) -> Expr:
    x, y = n.operands
    at_zero = apply("and", op("eq", x, 0.0), op("ge", y, 0.0), dtype="bool")
    return apply("where", at_zero, const(0.0, n.dtype), op("mul", n, op("log", x)), dtype=n.dtype)


def _of_modulus(n: Apply) -> Expr:
    return op("neg", op("floor", op("div", *n.operands)))


def _of_erf(n: Apply) -> Expr:
    (x,) = n.operands
    return op("mul", op("exp", op("neg", op("mul", x, x))), 2 / math.sqrt(math.pi))


_ALL = -math.inf
_EXTREME = "tl.{0}({{0}}, {{1}})", "tl.{0}({{0}}, {{1}}, propagate_nan=tl.PropagateNan.ALL)"

_ROWS = (
    # --------------------------------------------------------------------------------------------------- arithmetic
    Operator("neg", torch.neg, 1, ("neg",), "-", _NEGATIVE, (_minus_one,), "-{0}", "-{0}", finite=True),
    Operator("abs", torch.abs, 1, ("abs",), partials=(lambda n: op("sign", n.operands[0]),), cpp="f_abs({0})",
             triton="tl.abs({0})", finite=True),
    Operator("sign", torch.sign, 1, ("sign",), partials=(_nothing,), cpp="f_sign({0})", triton="f_sign({0})", jumps=True),
    _between("add", torch.add, "+", _SUM, partials=(_one, _one), finite=True),
    _between("sub", torch.sub, "-", _SUM, partials=(_one, _minus_one), finite=True),
    _between("mul", torch.mul, "*", _PRODUCT, aten=("mul",), partials=(lambda n: n.operands[1], lambda n: n.operands[0]),
             finite=True, wide_number=True),
    _between("div", torch.div, "/", _PRODUCT, partials=(lambda n: op("reciprocal", n.operands[1]), _of_quotient), costly=True,
             wide_number=True),
    Operator("reciprocal", torch.reciprocal, 1, ("reciprocal",), partials=(lambda n: op("neg", op("mul", n, n)),),
             cpp="f_reciprocal({0})", triton="f_reciprocal({0})"),
    Operator("floordiv", torch.floor_divide, 2, ("floor_divide",), "//", _PRODUCT, (_nothing, _nothing), "f_floordiv({0}, {1})",
             "f_floordiv({0}, {1})", "f_floordiv_real({0}, {1})", costly=True, jumps=True, wide_number=True),
    Operator("mod", torch.remainder, 2, ("remainder",), "%", _PRODUCT, (_one, _of_modulus), "f_mod({0}, {1})",
             "f_mod({0}, {1})", "f_mod_real({0}, {1})", costly=True, jumps=True),
    Operator("minimum", torch.minimum, 2, ("minimum",), cpp="f_minimum({0}, {1})", triton=_EXTREME[0].format("minimum"),
             triton_real=_EXTREME[1].format("minimum"), finite=True),
    Operator("maximum", torch.maximum, 2, ("maximum",), cpp="f_maximum({0}, {1})", triton=_EXTREME[0].format("maximum"),
             triton_real=_EXTREME[1].format("maximum"), finite=True),
    # ---------------------------------------------------------------------------------------------------- functions
    _function("exp", torch.exp, lambda n: n, rising=_ALL, costly=True),
    _function("exp2", torch.exp2, lambda n: op("mul", n, math.log(2)), rising=_ALL, costly=True),
    _function("expm1", torch.expm1, lambda n: op("add", n, 1.0), "libdevice.expm1({0})", rising=_ALL, costly=True),
    _function("log", torch.log, lambda n: op("reciprocal", n.operands[0]), rising=0.0, costly=True),
    _function("log2", torch.log2, lambda n: op("reciprocal", op("mul", n.operands[0], math.log(2))), rising=0.0, costly=True),
    _function("log1p", torch.log1p, lambda n: op("reciprocal", op("add", n.operands[0], 1.0)), "libdevice.log1p({0})",
              rising=-1.0, costly=True),
    _function("tanh", torch.tanh, lambda n: op("sub", 1.0, op("mul", n, n)), "libdevice.tanh({0})", rising=_ALL, finite=True,
              costly=True),
    _function("sigmoid", torch.sigmoid, lambda n: op("mul", n, op("sub", 1.0, n)), rising=_ALL, finite=True, costly=True),
    _function("sqrt", torch.sqrt, lambda n: op("div", 0.5, n), rising=0.0, costly=True),
    _function("rsqrt", torch.rsqrt, lambda n: op("mul", op("div", n, n.operands[0]), -0.5), costly=True),
    _function("erf", torch.erf, _of_erf, rising=_ALL, costly=True),
    _function("sin", torch.sin, lambda n: op("cos", n.operands[0]), costly=True),
    _function("cos", torch.cos, lambda n: op("neg", op("sin", n.operands[0])), costly=True),
    Operator("pow", torch.pow, 2, ("pow",), "**", _POWER, (_of_base, _of_exponent), "f_pow({0}, {1})",
             "libdevice.pow({0}, {1})", costly=True),
    _function("floor", torch.floor, _nothing, rising=_ALL, jumps=True),
    _function("ceil", torch.ceil, _nothing, rising=_ALL, jumps=True),
    _function("trunc", torch.trunc, _nothing, "libdevice.trunc({0})", rising=_ALL, jumps=True),
    _function("round", torch.round, _nothing, "libdevice.rint({0})", rising=_ALL, jumps=True),
    # -------------------------------------------------------------------------------------------------------- truth
    _compared("eq", torch.eq, "=="), _compared("ne", torch.ne, "!="), _compared("lt", torch.lt, "<"),
    _compared("le", torch.le, "<="), _compared("gt", torch.gt, ">"), _compared("ge", torch.ge, ">="),
    _logical("and", torch.bitwise_and, "and", _AND, "&"), _logical("or", torch.bitwise_or, "or", _OR, "|"),
    _logical("xor", torch.bitwise_xor, "^", _AND, "^"),
    Operator("not", torch.bitwise_not, 1, ("logical_not", "bitwise_not"), "not ", _NOT, cpp="~{0}", finite=True),
    Operator("isnan", torch.isnan, cpp="f_isnan({0})", triton="f_isnan({0})", jumps=True),
    Operator("isinf", torch.isinf, cpp="f_isinf({0})", triton="f_isinf({0})", jumps=True),
    # ------------------------------------------------------------------------------------------------------- others
    Operator("where", torch.where, 3, finite=True),
    Operator("cast", Tensor.to, 1, finite=True),
    # uniform(seed, plane, row, column): the float32 in [0, 1) that fuse.ir.philox gives for these int64
    Operator("uniform", philox.uniform, 4, cpp="f_uniform({0}, {1}, {2}, {3})", finite=True),
)  # fmt: skip

OPERATORS = {row.name: row for row in _ROWS}
ARITY = {row.name: row.arity for row in _ROWS}
assert set(COMPARISONS) < set(OPERATORS)
