"""A softmax whose rows without a finite score give zeros, where it is written out: as decomposed programs have it."""

from __future__ import annotations

import math
from typing import Any

from fuse.passes.read.elements import op_name
from fuse.passes.read.trace import Value, computed
from fuse.torch_private import safe_softmax as aten_safe_softmax

_NOT = ("logical_not", "bitwise_not")


def safe_softmax(condition: Any, zero: Any, other: Any) -> Value | None:
    """``aten::_safe_softmax`` if ``where(condition, zero, other)`` is one: 0 where every score of the row is -inf."""
    softmax = _uncast(other)
    if op_name(softmax) != "_softmax" or _number(zero) != 0:
        return None
    scores, dim = softmax.args[:2]
    tested = _rows_all_infinite(condition, dim)
    if tested is None or tested not in (scores, _uncast(scores)):
        return None
    return computed([scores], lambda s: aten_safe_softmax(s, dim).to(other.meta.dtype))


def _uncast(v: Any) -> Value:
    """Casts between floats leave -inf what it is."""
    while op_name(v) == "_to_copy" and v.args[0].meta.is_floating_point():
        v = v.args[0]
    return v  # type: ignore[no-any-return]


def _rows_all_infinite(condition: Any, dim: int) -> Value | None:
    """x, if ``condition`` says of each row along ``dim`` that all of it is -inf."""
    if op_name(condition) in _NOT and op_name(some := condition.args[0]) == "any" and _along(some, dim):
        finite = some.args[0]
        return _compared(finite, "ne") or (_compared(finite.args[0], "eq") if op_name(finite) in _NOT else None)
    return _compared(condition.args[0], "eq") if op_name(condition) == "all" and _along(condition, dim) else None


def _compared(v: Any, how: str) -> Value | None:
    """x of x == -inf."""
    if not isinstance(v, Value) or op_name(v) != how:
        return None
    x, y = v.args[:2]
    return x if isinstance(x, Value) and _number(y) == -math.inf else None


def _along(v: Value, dim: int) -> bool:
    """Is it a reduction over ``dim`` that keeps it, with size one?"""
    over, keep = (*v.args[1:], None, None)[:2]
    source = v.args[0]
    given = [over] if isinstance(over, int) else over
    count = len(source.shape)
    return bool(keep) and isinstance(given, (list, tuple)) and [d % count for d in given] == [dim % count]


def _number(x: Any) -> float | None:
    """The number that a tensor holds everywhere, or a number."""
    if not isinstance(x, Value):
        return x if isinstance(x, (int, float)) else None
    if x.literal is not None or x.op is None:
        return x.literal
    at = {"full": 1, "full_like": 1, "scalar_tensor": 0, "new_full": 2}.get(op_name(x))
    if at is not None:
        return _number(x.args[at])
    return 0.0 if op_name(x) in ("zeros", "zeros_like", "new_zeros") else None
