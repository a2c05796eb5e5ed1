"""Documents as programs: their blocks run one after the other, and print what the document says that they print.

A block of ``python`` runs as a file of its own, example.py, whose names the next blocks see. One of ``text`` is what the block
before it prints. One of ``console`` holds commands, each behind "$ ", and what they print. ``<!-- skip: next "why" -->`` stands
before a block that only illustrates. "…" stands for anything in a line, alone for any lines; FIGURES says
what varies.
"""

from __future__ import annotations

import ast
import linecache
import os
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from fuse.settings import settings

ROOT = Path(__file__).parents[1]
# What another machine or version prints otherwise, and what stands for it where outputs are compared.
FIGURES = (
    (r"\d[\d.,]*(e[+-]\d+)?(?= ?(%|ms|us|s|MB)(?![\w/]))", "#"),  # times, memory, shares of tiles
    (r"nothing, .*?(?= \()|\d+ % of the tiles(?= \()", "#"),  # of which there may be one
    (r"\d[\d.]*e[+-]\d+", "#"),  # errors
    (r"\b[0-9a-f]{12,}\b", "#"),  # digests of sources
    (r"(?<=\d)_(avx2|avx512|avx512_bf16|amx|neon|sse)\b", "_#"),
    (r"(?<=constexpr int BK = )\d+", "#"),  # keys of a tile
    (r"(?<=\w_attention\.py:)\d+|(?<=modeling_\w{3}\.py:)\d+", "#"),  # lines of transformers
    (r" +", " "),  # columns are as wide as what varies in them
)
INDENTED = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
Captured = pytest.CaptureFixture[str]  # of file descriptors: other processes print, too


def run(path: Path, patch: pytest.MonkeyPatch, captured: Captured) -> list[str]:
    """Runs a document, and gives why each block that was skipped was. Raises AssertionError."""
    session = Session(path, patch, captured)
    parsers = [SkipParser(), *(CodeBlockParser(*runner) for runner in session.runners.items())]
    reasons, document = [], Sybil(parsers=parsers).parse(path)
    document.namespace["__name__"] = "example"
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            reasons.append(str(skipped))
    return reasons


def run_example(path: Path, patch: pytest.MonkeyPatch, captured: Captured) -> None:
    """Runs the command that an example's docstring shows, and compares what it prints. Raises AssertionError."""
    docstring = f"{ast.get_docstring(ast.parse(path.read_text()))}\n"
    command, expected = (textwrap.dedent(block) for block in INDENTED.findall(docstring)[:2])
    session = Session(path, patch, captured)
    session.printed = session.shell(command.strip())
    session.compare(1, expected)


class Session:
    """One run of a document: what its last block printed."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, captured: Captured) -> None:
        self.path, self.patch, self.captured, self.printed = path, patch, captured, ""
        self.runners: dict[str, Callable[[Example], None]] = {
            "python": self.python, "text": self.text, "console": self.console,
        }  # fmt: skip

    def python(self, example: Example) -> None:
        source = example.parsed
        Path("example.py").write_text(source)
        linecache.checkcache("example.py")
        self.printed = self.output(lambda: exec(compile(source, "example.py", "exec"), example.namespace))

    def text(self, example: Example) -> None:
        self.compare(example.line, example.parsed)

    def console(self, example: Example) -> None:
        for command, expected in commands(example.parsed):
            self.printed = self.shell(command)
            if expected:
                self.compare(example.line, expected)

    def shell(self, line: str) -> str:
        words = shlex.split(line, comments=True)
        while "=" in words[0]:
            self.patch.setenv(*words.pop(0).split("=", 1))
        match words:
            case ["make", *targets]:
                assert set(targets) - defined() == set(), f"Makefile has no {targets}"
                return ""
            case ["pip", *_]:
                return ""
            case ["python", "-m", module, *arguments]:
                return self.program(module, arguments, lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
            case ["python", script, *arguments]:
                return self.program(script, arguments, lambda: runpy.run_path(script, run_name="__main__"))
        raise AssertionError(f"{self.path.name}: no document may call {line!r}")

    def program(self, name: str, arguments: list[str], call: Callable[[], object]) -> str:
        self.patch.setattr(sys, "argv", [name, *arguments])
        return self.output(call)

    def output(self, call: Callable[[], object]) -> str:
        self.captured.readouterr()
        try:
            call()
        except SystemExit as end:  # of a command
            assert not end.code or isinstance(end.code, int), end.code
        return self.captured.readouterr().out

    def compare(self, line: int, expected: str) -> None:
        wanted, found = (lines(text) for text in (expected, self.printed))
        pattern = "\n".join("(?s:.*)" if text == "…" else ".*".join(map(re.escape, text.split("…"))) for text in wanted)
        said = f"{self.path.name}:{line} says\n{expected}\nbut it prints\n{self.printed}"
        assert re.fullmatch(pattern, "\n".join(found)), said


def lines(text: str) -> list[str]:
    text = text.replace(str(settings().cache_dir), "~/.cache/fuse").replace(os.path.expanduser("~/"), "~/")
    for pattern, instead in FIGURES:
        text = re.sub(pattern, instead, text)
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def commands(block: str) -> Iterator[tuple[str, str]]:
    """(command, what it prints)"""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output.strip("\n")


def defined() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
