"""How a Triton source reads from the top: an outline after its header, functions that are called, arguments that are read, and
no line of code beyond what a screen shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.source import CONTENTS, alone_lines, environment, made_by, operand_lines

WIDTH = 128
# What names of kernels begin with; other functions are called by them.
KERNEL = "fuse_"
_NAMED = re.compile(r"^def (\w+)\(", re.MULTILINE)
# What is no code.
_SAID = re.compile(r'#.*|""".*"""')
# Spaces where a line may be broken inside brackets: behind a comma, before an operator.
_BREAK = re.compile(r"(?<=,) | (?=(?:[-+*/&|<>]|//|[<>=!]=) )")


def rendered(template: str, spec: AttentionSpec | TileMap, header: Sequence[str], context: Mapping[str, object]) -> str:
    """What ``template`` makes of ``context``, below ``header`` and an outline."""
    text = environment().get_template(f"triton/{template}.py.jinja").render(context).strip()
    imports, *parts = re.split(r"\n+(?=@triton\.jit|if __name__)", re.sub(r"\n\s*\n(?= )", "\n", text))
    parts = [_taking_what_it_reads(part) if _name(part).startswith(KERNEL) else part for part in _called(parts)]
    used = _words("\n".join(parts))
    needed = "\n".join(line for line in imports.splitlines() if line.split()[-1] in used)
    alone = alone_lines() if "__name__" in used else []
    lines = [
        *header, made_by(), *alone, *operand_lines(spec), CONTENTS, *_contents(parts),
    ]  # fmt: skip
    code = "\n\n\n".join([needed, *parts])
    return "\n".join([*(f"# {line}" for line in lines), *map(_broken, code.split("\n"))]) + "\n"


def _name(part: str) -> str:
    """Of the function, if it is one."""
    found = _NAMED.search(part)
    return found[1] if found else ""


def _words(part: str) -> set[str]:
    """Names in its code."""
    return set(re.findall(r"[A-Za-z_]\w*", _SAID.sub("", part)))


def _contents(parts: Sequence[str]) -> list[str]:
    """The kernels and what they say of themselves, then what is marked."""
    found = [re.search(r'def (\w+)\((?:.|\n)*?"""(.*)"""', part) for part in parts if _name(part).startswith(KERNEL)]
    kernels = [m.groups() for m in found if m is not None]
    marks = dict.fromkeys(mark for part in parts for mark in re.findall(r"(# edit): (.*)", part))
    return [f"  {name:<24} {what}" for name, what in (*kernels, *marks)]


def _called(parts: Sequence[str]) -> list[str]:
    """Without the functions that no kernel needs."""
    functions = {name: part for part in parts if (name := _name(part))}
    needed: set[str] = set()
    left = {name for name in functions if name.startswith(KERNEL)}
    while left:
        name = left.pop()
        needed.add(name)
        left |= (_words(functions[name]) & functions.keys()) - needed
    return [part for part in parts if _name(part) in {"", *needed}]


def _taking_what_it_reads(kernel: str) -> str:
    """Templates list what a kernel may take, in lines of one kind each; of these it takes what its body reads."""
    head, _, body = kernel.partition("\n):\n")
    decorator, name, *kinds = head.split("\n")
    read = _words(body)
    taken = [[a for a in re.split(r",\s*", kind.strip()) if a.partition(":")[0] in read] for kind in kinds]
    symbols = [symbol for symbol in re.findall(r"'(\w+)'", decorator) if symbol in read]
    lines = [_broken(f"    {', '.join(kind)},", depth=1) for kind in taken if kind]
    return "\n".join([f"@triton.jit(do_not_specialize={symbols})", name, *lines, "):", body])


def _broken(line: str, depth: int = 0) -> str:
    """``depth``: of brackets that are open where the line begins."""
    start = line.lstrip()
    if len(line) <= WIDTH or start.startswith(("#", '"')):
        return line
    indent = len(line) - len(start)
    depths = _depths(line, depth)
    places = [m.start() for m in _BREAK.finditer(line)]
    if depth == 0 and " = " in line and any(depths[i] == 0 and i > line.index(" = ") + 2 for i in places):
        name, _, value = line.partition(" = ")
        return _broken(f"{name} = ({value})")
    places = [i for i in places if indent + 8 < i <= WIDTH and depths[i]]
    if not places:
        return line
    rank = {i: (depths[i], line[i + 1] in "*/") for i in places}
    place = max(i for i in places if rank[i] == min(rank.values()))
    rest = " " * (indent + (0 if depth else 4)) + line[place + 1 :]
    return f"{line[:place]}\n{_broken(rest, depths[place])}"


def _depths(line: str, depth: int) -> list[int]:
    """Brackets that are open at each character; strings of kernels hold none."""
    found = []
    for c in line:
        depth += (c in "([{") - (c in ")]}")
        found.append(depth)
    return found
