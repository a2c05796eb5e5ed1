"""What a buffer holds now is read as a formula where it is one, such as nanoGPT's ``tril`` of ones: structure, not data.

A stored tensor is compared, entry by entry, with what a formula of its two places gives: one number; arithmetic along one of
them; or one number where ``lower <= column - row <= upper`` and another elsewhere. What is equal is put in the place of the
load, and whoever gave the contents sees to it that the graph is compiled anew when they change.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fuse.ir import expr
from fuse.ir.expr import FLOATS, Const, Expr, Load, apply, axes, const
from fuse.passes.lift import Lifted, SiteContext

_MOST = 2**26  # entries that are looked at


def know_contents(lifted: Lifted, context: SiteContext) -> Lifted:
    """The site without operands of which it is known what they hold."""
    spec, found, relied = lifted.spec, dict[Expr, Expr](), list(lifted.relied)
    operands = {load.operand for load in (spec.query, spec.key, spec.value)}
    for load in {n: None for root in spec.roots().values() for n in expr.walk(root) if isinstance(n, Load)}:
        node = context.trace.node_of.get(lifted.leaves[load.operand])
        if load.operand in operands or node is None or (held := context.contents.of(node)) is None:
            continue
        formula = _formula(load, held)
        if formula is not None and context.contents.rely(node, partial(_holds, load, formula)):
            found[load] = formula
            relied.append(node)
    if not found:
        return lifted
    spec, read = spec.mapped(lambda root: expr.substitute(root, found)).pruned()
    return replace(lifted, spec=spec, leaves=tuple(lifted.leaves[i] for i in read), relied=tuple(dict.fromkeys(relied)))


def _holds(load: Load, formula: Expr, x: Tensor) -> bool:
    return _formula(load, x) is formula


def _formula(load: Load, held: Tensor) -> Expr | None:
    """What ``held`` has at the coordinates of ``load``, of which two at most are no numbers; None where it is not known.

    Where the same number is everywhere, the coordinates do not matter.
    """
    if held.numel() == 0 or held.numel() > _MOST or len(load.coords) != held.dim():
        return None
    varying = [c for c in load.coords if not isinstance(c, Const)]
    there = held[tuple(slice(None) if not isinstance(c, Const) else int(c.value) for c in load.coords)]
    if there.numel() > 1 and bool((there == there.flatten()[0]).all()):
        return const(there.flatten()[0].item(), load.dtype)
    if not all(axes(c) <= {"q", "k"} for c in varying):  # of texts or heads it may be any numbers
        return None
    if len(varying) == 1 and len(there) > 2:  # two numbers always are steps
        return _progression(varying[0], there, load.dtype)
    if len(varying) == 2 and axes(varying[0]) != axes(varying[1]):
        return _band(varying, there, load.dtype)
    return None


def _progression(place: Expr, held: Tensor, dtype: str) -> Expr | None:
    if dtype in FLOATS or dtype == "bool":
        return None
    first, step = int(held[0]), int(held[1]) - int(held[0])
    if not torch.equal(held, first + step * torch.arange(len(held), dtype=held.dtype, device=held.device)):
        return None
    steps = apply("mul", apply("cast", place, dtype=dtype), const(step, dtype), dtype=dtype)
    return apply("add", steps, const(first, dtype), dtype=dtype)


def _band(places: list[Expr], held: Tensor, dtype: str) -> Expr | None:
    """The places are the row and the column, in this order: which is which of queries and keys does not matter."""
    row, column = places
    for inside in (held.flatten()[0], held.flatten()[-1], held[0, -1], held[-1, 0]):
        found = held == inside
        others = held[~found]
        if others.numel() == 0 or not bool((others == others[0]).all()):
            continue
        limits = _limits(found)
        if limits is None:
            continue
        seen = _between(row, column, *limits)
        if dtype == "bool":
            return seen if bool(inside) else apply("not", seen, dtype="bool")
        return apply("where", seen, const(inside.item(), dtype), const(others[0].item(), dtype), dtype=dtype)
    return None


def _between(row: Expr, column: Expr, lower: int | None, upper: int | None) -> Expr:
    """lower <= column - row <= upper as people write it: windows by how far they do not reach any more."""
    if lower is not None and upper == -lower:
        return apply(
            "lt", apply("abs", apply("sub", row, column, dtype="int64"), dtype="int64"), const(upper + 1), dtype="bool"
        )
    distance = apply("sub", column, row, dtype="int64")
    ends = [apply("gt", distance, const(lower - 1), dtype="bool") if lower else apply("ge", distance, const(0), dtype="bool")]
    begins = [apply("lt", distance, const(upper + 1), dtype="bool") if upper else apply("le", distance, const(0), dtype="bool")]
    found = (ends if lower is not None else []) + (begins if upper is not None else [])
    return found[0] if len(found) == 1 else apply("and", *found, dtype="bool")


def _limits(found: Tensor) -> tuple[int | None, int | None] | None:
    """(lower, upper) of column - row where ``found`` is true and nowhere else; None: there is no such limit."""
    rows, columns = found.shape
    row, column = torch.arange(rows, device=found.device), torch.arange(columns, device=found.device)
    any_of = found.any(1)
    first, last = found.int().argmax(1), columns - 1 - found.flip(1).int().argmax(1)
    begins, ends = any_of & (first > 0), any_of & (last < columns - 1)
    lower = int((first - row)[begins][0]) if bool(begins.any()) else None
    upper = int((last - row)[ends][0]) if bool(ends.any()) else None
    distance = column - row[:, None]
    expected = torch.ones_like(found)
    if lower is not None:
        expected &= distance >= lower
    if upper is not None:
        expected &= distance <= upper
    return (lower, upper) if (lower, upper) != (None, None) and torch.equal(found, expected) else None
