"""How the place that a load reads follows from the query and the key."""

from __future__ import annotations

from fuse.ir.expr import Apply, Expr, Index, Load, axes


def is_affine(node: Expr, over: frozenset[str] = frozenset({"q", "k"})) -> bool:
    """Whether an integer expression is linear in the indices ``over``, with coefficients that do not depend on them."""
    if not axes(node) & over or isinstance(node, Index):
        return True
    if not isinstance(node, Apply):
        return False
    parts = all(is_affine(a, over) for a in node.operands)
    if node.op == "mul":
        return parts and any(not axes(a) & over for a in node.operands)
    return node.op in ("add", "sub", "neg", "cast") and parts and all(a.dtype == "int64" for a in node.operands)


def is_separable(node: Load) -> bool:
    """Whether no coordinate depends on both the query and the key."""
    return all(len(axes(c) & {"q", "k"}) < 2 for c in node.coords)
