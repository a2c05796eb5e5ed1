"""Interval arithmetic on tiles as Triton, with the functions of ``templates/triton/ranges.py.jinja``.

A range is a tuple: (can, must) of a truth value, (low, high) of an integer. Those of the positions that a program visits hold
one value for each of the tiles that are looked at together. Of reals that depend on queries and keys nothing is known.
"""

from __future__ import annotations

from dataclasses import replace

from fuse.ir.expr import INTS, Apply, Expr, Index, Load
from fuse.ir.interval import WHOLE
from fuse.kernel.ranges import RangeWriter, has_floats, is_narrowing
from fuse.targets.triton.write import Block, TritonWriter

_PREFIX = {"long": "int", "bool": "truth"}


class TritonRanges(RangeWriter):
    """``owned``, ``visited``: where values of the positions of ``owner``, "q" or "k", and of the others are written with their
    summaries, and what follows from both behind the latter."""

    def __init__(self, writer: TritonWriter, owner: str, owned: Block, visited: Block, count: list[int]) -> None:
        super().__init__(count)
        self._writer, self._owner = writer, owner
        self._owned, self._visited = owned, visited

    def constant(self, node: Expr, kind: str) -> str:
        return self.anything(kind) if kind == "real" else f"{_PREFIX[kind]}_point({self._writer.value(node)})"

    def position(self, node: Index) -> str:
        return f"range_{node.axis}"

    def summary(self, node: Expr, of_keys: bool, kind: str) -> str:
        if kind == "real":
            return self.anything(kind)
        at = "k" if of_keys else "q"
        block, axis = (self._owned, 0) if at == self._owner else (self._visited, 1)
        value, name = self._writer.value(node), self.new_name()
        block.lines.append(f"{name} = {_PREFIX[kind]}_over({value}, {at}_ok, {axis})")
        return name

    def lookup(self, node: Load, places: list[str]) -> str:
        near = " & ".join(f"({place}[1] - {place}[0] <= 1)" for place in places)
        corners = (self._writer_at({"q": q, "k": k}) for q in ("q0", "q1") for k in ("k0", "k1"))
        return f"int_among({', '.join(writer.load(node) for writer in corners)}, {near})"

    def _writer_at(self, names: dict[str, str]) -> TritonWriter:
        """Of the same statements, which it knows nothing of: they are about other positions."""
        return replace(self._writer, names=names, place=lambda axes: Block(self._writer.place(axes).lines))

    def operation(self, node: Apply) -> str | None:
        if has_floats(node):
            return None
        prefix = "truth" if node.operands[-1].dtype == "bool" else "int"
        return f"{prefix}_{node.op}({', '.join(self.range(a) for a in node.operands)})"

    def cast(self, node: Apply) -> str | None:
        source = node.operands[0]
        if is_narrowing(node):
            whole = WHOLE[node.dtype]
            return f"int_within({self.range(source)}, {whole.low}, {whole.high})"
        if source.dtype == "bool" and node.dtype in INTS:
            return f"int_of_truth({self.range(source)})"
        return f"int_ne({self.range(source)}, int_point(0))" if node.dtype == "bool" and source.dtype in INTS else None

    def anything(self, kind: str) -> str:
        return "(True, False)" if kind == "bool" else "int_anything()"

    def define(self, kind: str, text: str) -> str:
        name = self.new_name()
        self._visited.lines.append(f"{name} = {text}")
        return name
