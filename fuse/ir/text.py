"""Expressions as one line of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fuse.ir.expr import FLOATS, Apply, Const, Expr, Index, Load, Symbol
from fuse.ir.operators import OPERATORS


def to_text(root: Expr, names: Mapping[int, str] | None = None) -> str:
    """One line for people; casts between floats are left out. ``names`` gives operands their names in the model."""
    names = names or {}

    def show(n: Expr) -> str:
        if isinstance(n, Const):
            return f"{n.value:g}" if isinstance(n.value, float) else str(n.value)
        if isinstance(n, Index):
            return n.axis
        if isinstance(n, Symbol):
            return n.name
        if isinstance(n, Load):
            name = names.get(n.operand, f"operand{n.operand}")
            return f"{name}[{', '.join(map(show, n.coords))}]" if n.coords else name
        if isinstance(n, Apply):
            return _show_apply(n, show)
        return type(n).__name__.lower()

    return _bare(root, show(root))


def _show_apply(n: Apply, show: Callable[[Expr], str]) -> str:
    if n.op == "cast":
        floats = n.dtype in FLOATS and n.operands[0].dtype in FLOATS
        return show(n.operands[0]) if floats else f"{n.dtype}({_bare(n.operands[0], show(n.operands[0]))})"
    if _between(n):
        return f"({show(n.operands[0])} {OPERATORS[n.op].sign} {show(n.operands[1])})"
    return f"{n.op}({', '.join(_bare(a, show(a)) for a in n.operands)})"


def _bare(node: Expr, text: str) -> str:
    """The text of an argument or of a whole expression, which needs no parentheses."""
    return text[1:-1] if isinstance(node, Apply) and _between(node) else text


def _between(n: Apply) -> bool:
    """Whether the operator stands between its operands."""
    return n.op in OPERATORS and OPERATORS[n.op].arity == 2 and OPERATORS[n.op].sign != ""
