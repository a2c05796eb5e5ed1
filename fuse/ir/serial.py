"""Expressions as JSON, several as one table of nodes, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fuse.ir.expr import Apply, Const, Expr, Index, Load, Prob, Score, Symbol, const, walk


def in_graph(text: str) -> str:
    """JSON as the argument of an operator: Inductor's C++ wrapper writes it between double quotes, and escapes none."""
    return text.replace('"', "'")


def loads(text: str) -> Any:
    """Reads JSON without apostrophes in it, also as it stands in a graph."""
    return json.loads(text.replace("'", '"'))


def to_json(roots: Mapping[str, Expr]) -> dict[str, Any]:
    """Several expressions as one table of nodes, so that shared terms are written once."""
    order = {n: i for i, n in enumerate(walk(*roots.values()))}
    nodes = [[type(n).__name__, n.dtype, *_payload(n), *([[order[a] for a in n.args]] if n.args else [])] for n in order]
    return {"nodes": nodes, "roots": {name: order[root] for name, root in roots.items()}}


def _payload(n: Expr) -> list[Any]:
    if isinstance(n, Const):
        return [n.value if not isinstance(n.value, float) else float(n.value).hex()]
    if isinstance(n, Index):
        return [n.axis]
    if isinstance(n, Symbol):
        return [n.name]
    if isinstance(n, Load):
        return [n.operand]
    return [n.op] if isinstance(n, Apply) else []


def from_json(data: Mapping[str, Any]) -> dict[str, Expr]:
    """Inverse of ``to_json``."""
    built: list[Expr] = []
    for kind, dtype, *rest in data["nodes"]:
        built.append(_node(kind, dtype, rest, built))
    return {name: built[i] for name, i in data["roots"].items()}


def _node(kind: str, dtype: str, rest: list[Any], built: list[Expr]) -> Expr:
    if kind == "Const":
        return const(float.fromhex(rest[0]) if isinstance(rest[0], str) else rest[0], dtype)
    if kind == "Index":
        return Index(dtype, rest[0])
    if kind == "Symbol":
        return Symbol(dtype, rest[0])
    if kind == "Load":
        return Load(dtype, rest[0], tuple(built[i] for i in (rest[1] if len(rest) > 1 else [])))
    if kind == "Apply":
        return Apply(dtype, rest[0], tuple(built[i] for i in rest[1]))
    return {"Score": Score, "Prob": Prob}[kind](dtype)
