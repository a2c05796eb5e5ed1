"""Bounds of integers, from those of the indices and symbols that they are computed from."""

from __future__ import annotations

from collections.abc import Callable

from fuse.ir.expr import FLOATS, Apply, Const, Expr, Index, Symbol

Interval = tuple[int, int] | None

# Kernels refuse longer sequences, so index arithmetic can be proved to fit 32-bit lanes.
MAX_LENGTH = 2**24
_INT_RANGES = {"int32": 2**31, "int16": 2**15, "int8": 2**7, "uint8": 2**8, "bool": 1}


def anywhere(leaf: Expr) -> Interval:
    """Bounds of an index or a symbol that hold in every call; None for a symbol of which nothing is known."""
    if isinstance(leaf, Symbol):
        length = leaf.name in ("q_len", "kv_len") or (leaf.name[0] == "B" and leaf.name[1:].isdigit())
        return (0, MAX_LENGTH) if length else None
    return (0, MAX_LENGTH)


def interval(node: Expr, leaves: Callable[[Expr], Interval] = anywhere) -> Interval:
    """Bounds of an integer, from those of the indices and symbols in it; None where nothing is known."""
    if isinstance(node, Const):
        return (int(node.value), int(node.value))
    if isinstance(node, (Index, Symbol)):
        return leaves(node)
    if isinstance(node, Apply) and (bounds := _interval_of_operation(node, leaves)):
        return bounds
    if node.dtype in _INT_RANGES:
        limit = _INT_RANGES[node.dtype]
        return (0, limit) if node.dtype in ("uint8", "bool") else (-limit, limit)
    return None


def _interval_of_operation(node: Apply, leaves: Callable[[Expr], Interval]) -> Interval:
    parts = [interval(a, leaves) for a in node.operands if a.dtype not in FLOATS]
    known = [p for p in parts if p is not None]
    if not known or len(known) != len(node.operands):
        return None
    (a, b), (c, d) = known[0], known[-1]
    if node.op == "where":
        return (min(known[1][0], c), max(known[1][1], d))
    if node.op in ("floordiv", "mod") and c > 0:
        return (a // c if a < 0 else a // d, b // d if b < 0 else b // c) if node.op == "floordiv" else (0, d - 1)
    table: dict[str, Callable[[], tuple[int, int]]] = {
        "add": lambda: (a + c, b + d), "sub": lambda: (a - d, b - c), "neg": lambda: (-b, -a), "cast": lambda: (a, b),
        "mul": lambda: (min(a * c, a * d, b * c, b * d), max(a * c, a * d, b * c, b * d)),
        "minimum": lambda: (min(a, c), min(b, d)), "maximum": lambda: (max(a, c), max(b, d)),
        "abs": lambda: (0, max(abs(a), abs(b))), "sign": lambda: (-1, 1),
    }  # fmt: skip
    return table[node.op]() if node.op in table else None
