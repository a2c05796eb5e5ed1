"""A program while it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from hypothesis import strategies as st

from fuzz.program import Program

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """``lead``: dimensions before length and features; ``kv_lead``: those of keys and values; ``square``: n is m."""

    lead: tuple[int, ...]
    kv_lead: tuple[int, ...]
    qk: int
    v: int
    square: bool


@dataclass
class Draft:
    """A program while it is written. In its lines ``q``, ``k``, ``v``, ``s``, ``p`` and ``out`` are what they are called."""

    draw: st.DrawFn
    dtype: str
    sizes: Sizes
    training: bool
    lines: list[str] = field(default_factory=list)
    inputs: list[tuple[str, str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)

    def one(self, *choices: T) -> T:
        return self.draw(st.sampled_from(choices))

    def often(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def write(self, line: str) -> None:
        if line.partition(" = ")[0] != line.partition(" = ")[2]:
            self.lines.append(line)

    def given(self, expression: str, name: str = "") -> str:
        """The name of a new input, or of that one."""
        name = name or f"x{len(self.inputs)}"
        if name not in dict(self.inputs):
            self.inputs.append((name, expression))
        return name

    def program(self, result: str, lengths: tuple[tuple[int, int], ...], inner: str) -> Program:
        body = (*self.lines, f"return {result}")
        return Program(tuple(self.inputs), body, lengths, self.dtype, self.training, inner)
