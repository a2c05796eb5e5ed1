"""Weights that are a sum: (a p + b r) @ v = a (p @ v) + b (r @ v), an attention for each term, which the graph adds up.

What a result is linear in is followed from the result to the sum: views, casts, factors, and one side of the product. A term
that is no attention, such as weights of positions alone, stays the product that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from fuse.passes.read.elements import PRODUCTS, op_name
from fuse.passes.read.trace import Value, computed

aten = torch.ops.aten
_MANY = 4  # terms that are taken apart
# What is linear in its first argument, beside views
_LINEAR = {
    "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select",
    "_to_copy", "clone", "alias", "sum", "div", "neg",
}  # fmt: skip
_SUMS = {"add", "sub", "rsub"}
_NORMALISED = {"_softmax", "_safe_softmax", "exp"}


def terms_of(out: Value, stops: Container[Value]) -> tuple[Value, ...]:
    """Values whose sum is ``out``, where the weights of its product are a sum; none where they are not.

    stops  values at which gradients end
    """
    found = _apart(out, stops, False)
    return tuple(map(_wide, found)) if 1 < len(found) <= _MANY else ()


def _wide(term: Value) -> Value:
    """Halves are added up in float32."""
    return term if term.dtype in ("float32", "float64") else computed([term], lambda x: x.to(torch.float32))


def _apart(v: Value, stops: Container[Value], inside: bool) -> list[Value]:
    """The terms of ``v``; ``inside``: below the product, where a sum is one of weights."""
    if v.op is None or v in stops:
        return [v]
    name = op_name(v)
    if inside and name in _SUMS and _is_normalised(v):
        return [term for x in _addends(v, name) for term in _apart(x, stops, True)]
    for i in _followed(v, name):
        x = v.args[i]
        terms = _apart(x, stops, inside or name in PRODUCTS or _is_sum_of_products(v, name))
        if len(terms) > 1:
            whole = _instead(v, 1, total) if name == "div" and (total := _total_of(v.args[1], x)) is not None else v
            return [_instead(whole, i, term) for term in terms]
    return [v]


def _followed(v: Value, name: str) -> tuple[int, ...]:
    """The arguments that a sum of weights may come by, of which v is linear."""
    if name in ("bmm", "mm", "mul"):
        values = [i for i in (0, 1) if isinstance(v.args[i], Value)]
        return tuple(i for i in values if not any(_is_normalised(v.args[j]) for j in values if j != i))
    zero = name == "masked_fill" and _is_zero(v.args[2])
    return (0,) if (name in _LINEAR or zero) and isinstance(v.args[0], Value) else ()


def _is_zero(x: Any) -> bool:
    return (x.literal if isinstance(x, Value) else x) == 0


def _is_sum_of_products(v: Value, name: str) -> bool:
    return name == "sum" and op_name(v.args[0]) == "mul"


def _is_normalised(v: Value) -> bool:
    """Is a softmax or an exponential in it, before any product?"""
    seen: set[Value] = set()
    stack = [v]
    while stack:
        x = stack.pop()
        if op_name(x) in _NORMALISED:
            return True
        if x not in seen and op_name(x) not in PRODUCTS:
            seen.add(x)
            stack.extend(x.inputs())
    return False


def _addends(v: Value, name: str) -> list[Value]:
    """The two operands of a sum as tensors of its shape and dtype, with their signs and factors."""
    a, b = v.args[:2]
    alpha = v.kwargs.get("alpha", 1)
    first, second = (b, a) if name == "rsub" else (a, b)
    factor = alpha if name == "add" else -alpha
    return [_shaped(v, first, lambda x: x), _shaped(v, second, lambda x: x if factor == 1 else x * factor)]


def _shaped(v: Value, x: Any, of: Callable[[Any], Any]) -> Value:
    if not isinstance(x, Value):
        return computed([v], lambda like: torch.full_like(like, of(x)))
    return computed([x], lambda x: of(x).to(v.meta.dtype).expand(v.shape))


def _instead(v: Value, position: int, x: Value) -> Value:
    """The call that v is a result of with another argument."""
    op: Any = aten.reshape.default if op_name(v) in ("view", "_unsafe_view") else v.op
    others = [a for i, a in enumerate(v.args) if i != position and isinstance(a, Value)]

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        args = [x if i == position else next(given) if isinstance(a, Value) else a for i, a in enumerate(v.args)]
        return op(*args, **v.kwargs)  # type: ignore[no-any-return]

    return computed([x, *others], call)


def _total_of(s: Any, x: Value) -> Value | None:
    """The sum ``s`` of the weights x of each row, in terms of their factors: a softmax adds up to one."""
    if not isinstance(s, Value):
        return None
    behind = s.args[0] if op_name(s) == "unsqueeze" and s.args[1] in (-1, len(s.shape) - 1) else s
    if op_name(behind) != "sum" or behind.args[0] is not x or len(s.shape) != len(x.shape):
        return None
    last = len(x.shape) - 1
    return _total(x) if [d % (last + 1) for d in behind.args[1]] == [last] else None


def _total(x: Value) -> Value | None:
    """The sum over the last dimension, which stays with size one, where it needs no element of a softmax."""
    name = op_name(x)
    if name == "_softmax":
        over = x.args[1] % len(x.shape) == len(x.shape) - 1
        return computed([x], lambda p: torch.ones((*p.shape[:-1], 1), dtype=p.dtype, device=p.device)) if over else None
    if name in ("_to_copy", "clone", "alias", "neg") or (name == "expand" and x.args[0].shape[-1:] == x.shape[-1:]):
        total = _total(x.args[0])
        return total if total is None or name != "neg" else computed([total], torch.neg)
    if name in _SUMS:
        totals = [_total(addend) for addend in _addends(x, name)]
        given = [t for t in totals if t is not None]
        return computed(given, torch.add) if len(given) == 2 else None
    if name in ("mul", "div"):
        for i in (0, 1) if name == "mul" else (0,):
            factor = x.args[1 - i]
            alike = not isinstance(factor, Value) or len(factor.shape) == 0 or factor.shape[-1] == 1
            if alike and isinstance(x.args[i], Value) and (total := _total(x.args[i])) is not None:
                return _instead(x, i, total)
    return None
