"""What every expression that a pass produces must keep: arities, dtypes, indices and operands in scope."""

from __future__ import annotations

from collections.abc import Mapping

from fuse.ir.expr import COMPARISONS, DTYPES, FLOATS, Apply, Expr, Index, Load, walk
from fuse.ir.operators import ARITY


class InvalidExpr(ValueError):
    """An expression that no pass may produce; always a defect of fuse."""


def verify(root: Expr, *, axes_allowed: frozenset[str], operand_ranks: Mapping[int, int]) -> None:
    """Raises InvalidExpr if a node has a wrong arity or dtype, reads an index not in scope, or misreads an operand."""
    for n in walk(root):
        if n.dtype not in DTYPES:
            raise InvalidExpr(f"dtype {n.dtype!r} of {n} is none of {DTYPES}")
        if isinstance(n, Index) and n.axis not in axes_allowed:
            raise InvalidExpr(f"index {n.axis!r} is not in scope: {sorted(axes_allowed)}")
        if isinstance(n, Load):
            _verify_load(n, operand_ranks)
        if isinstance(n, Apply):
            _verify_apply(n)


def _verify_load(n: Load, ranks: Mapping[int, int]) -> None:
    if n.operand not in ranks:
        raise InvalidExpr(f"{n} reads operand {n.operand}; there are {sorted(ranks)}")
    if len(n.coords) != ranks[n.operand]:
        raise InvalidExpr(f"{n} gives {len(n.coords)} coordinates; operand {n.operand} has {ranks[n.operand]} dimensions")
    if any(c.dtype != "int64" for c in n.coords):
        raise InvalidExpr(f"{n} has a coordinate that is not int64")


def _verify_apply(n: Apply) -> None:
    if ARITY.get(n.op) != len(n.operands):
        raise InvalidExpr(f"{n.op!r} with {len(n.operands)} operands")
    types = [a.dtype for a in n.operands]
    if n.op == "where":
        ok = types[0] == "bool" and types[1] == types[2] == n.dtype
    elif n.op in COMPARISONS:
        ok = types[0] == types[1] and n.dtype == "bool"
    elif n.op in ("isnan", "isinf"):
        ok = n.dtype == "bool"
    elif n.op == "uniform":
        ok = n.dtype == "float32" and all(t == "int64" for t in types)
    elif n.op in ("and", "or", "xor", "not"):
        ok = n.dtype not in FLOATS and all(t == n.dtype for t in types)
    else:
        ok = n.op == "cast" or all(t == n.dtype for t in types)
    if not ok:
        raise InvalidExpr(f"{n.op} of ({', '.join(types)}) as {n.dtype}")
