"""Which roundings are part of the function: those of what decides something.

Kernels leave out the roundings of 16-bit dtypes, which only cost precision. Below an operator that jumps they are performed,
as eager performs them: 257 in bfloat16 is 256, and so not larger than 256.
"""

from __future__ import annotations

from fuse.expr import COMPARISONS, FLOATS, Apply, Const, Expr, const, rounded

_JUMPS = (*COMPARISONS, "floor", "ceil", "trunc", "round", "sign", "isnan", "isinf", "floordiv", "mod")
# Operators that PyTorch gives a number on their right in float32 beside a 16-bit tensor; to others it is of the tensor's dtype.
_WIDE_NUMBERS = ("mul", "div", "floordiv")


def decides(node: Expr) -> bool:
    """Whether the value of ``node`` can jump where a float that it is computed of changes by a rounding."""
    if not isinstance(node, Apply) or all(a.dtype not in FLOATS for a in node.operands):
        return False
    return node.op in _JUMPS or (node.op == "cast" and node.dtype not in FLOATS)


def as_taken(node: Apply) -> tuple[Expr, ...]:
    """The operands of ``node``, constants among them as the numbers that eager computes it with."""
    return tuple(_number(node, i) if isinstance(a, Const) and a.dtype in FLOATS else a for i, a in enumerate(node.operands))


def _number(node: Apply, position: int) -> Const:
    operand = node.operands[position]
    assert isinstance(operand, Const)
    wide = position == 1 and node.op in _WIDE_NUMBERS and operand.dtype != "float64"
    return const(rounded(operand.value, "float32" if wide else operand.dtype), operand.dtype)
