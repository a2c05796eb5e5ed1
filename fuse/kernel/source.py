"""What sources of all targets have in common: the entry point's name, the header, and the templates they are rendered by."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import jinja2
import torch

import fuse.templates
from fuse.ir.expr import Expr, Load, walk
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import KEYS, ROWS, TileMap

ENTRY = "fuse_attention"
READ, CONTENTS = "read from the entry up: each part uses those above it", "contents, in order"
_SAID = re.compile(r"(?://|#) (\S.*)")
# Lines of the header that are no formula.
_ABOUT = re.compile(r"(spec|plan|wanted|sizes|result)  |(made by|alone:|without Python:|operand \d|read from|contents,)")


@dataclass(frozen=True)
class Header:
    """What a source says of itself in the comment at its top.

    formula  what it computes, a line each
    spec     as its to_json() gives it; "" where that is gone
    wanted   of gradients, the operands that they are of
    plan     as it prints
    """

    formula: tuple[str, ...]
    spec: str = ""
    wanted: tuple[bool, ...] = ()
    plan: str = ""

    @property
    def of_map(self) -> bool:
        """Whether the spec is a TileMap."""
        return bool(self.spec) and "version" not in json.loads(self.spec)


def header_of(text: str) -> Header:
    """Of a source, be it edited."""
    lines = []
    for line in text.splitlines():
        if (found := _SAID.fullmatch(line)) is None:
            break
        lines.append(found[1])
    by_word = {word: rest.strip() for word, _, rest in (line.partition("  ") for line in lines)}
    formula = tuple(line for line in lines if not _ABOUT.match(line))
    try:
        json.loads(spec := by_word.get("spec", ""))
        wanted = tuple(map(bool, json.loads(by_word.get("wanted", "[]"))))
    except ValueError:
        spec, wanted = "", ()
    return Header(formula, spec, wanted, by_word.get("plan", ""))


def alone_lines(without_python: str = "") -> list[str]:
    """How a source is run by itself."""
    return [
        "alone: python -m fuse.alone <this file>, which compares it with float64 and times it beside SDPA",
        *([f"without Python: {without_python}"] if without_python else []),
    ]


def header_lines(spec: AttentionSpec) -> list[str]:
    logits = "".join(f", {x}" for x in spec.extra_logits)
    return [
        f"out = sum over k of w * value,  w = {spec.weight}",
        spec.normalised + (f"  (joined by {logits[2:]})" if logits else ""),
        *([] if spec.mask is None else [f"visible where {spec.mask.predicate}"]),
        f"spec  {spec.to_json()}",
    ]


def operand_lines(spec: AttentionSpec | TileMap, result: str = "") -> list[str]:
    """Number, dtype, rank and part of each operand, of query, key and value which element; then sizes, and the result, if it is
    not what the spec says."""
    roots: dict[str, Expr] = spec.roots() if isinstance(spec, AttentionSpec) else {"mask": spec.predicate}
    parts: dict[int, list[str]] = {}
    for name, root in roots.items():
        for node in walk(root):
            if isinstance(node, Load) and _part(name, root, node) not in parts.setdefault(node.operand, []):
                parts[node.operand].append(_part(name, root, node))
    return [
        *(
            f"operand {i} {o.dtype}, {o.rank} dimensions: {', '.join(parts.get(i, ['not read']))}"
            for i, o in enumerate(spec.operands)
        ),
        f"sizes     {', '.join(spec.symbols)}",
        f"result    {result or _result(spec)}",
    ]


def _part(name: str, root: Expr, load: Load) -> str:
    return f"{name} at [{', '.join(map(str, load.coords))}]" if load is root and name in ("query", "key", "value") else name


def _result(spec: AttentionSpec | TileMap) -> str:
    batch = [f"b{i}" for i in range(spec.batch)]
    if isinstance(spec, TileMap):
        return f"{spec.out_dtype} at [{', '.join([*batch, f'q // {ROWS}', f'k // {KEYS}'])}]"
    dims = [*batch, "q", "e"]
    return f"{spec.out_dtype} at [{', '.join(dims)}], in memory by {', '.join(dims[i] for i in spec.out_order)}"


def made_by() -> str:
    return f"made by torch-fuse {_version()}, torch {torch.__version__}"


@cache
def _version() -> str:
    try:
        return metadata.version("torch-fuse")
    except metadata.PackageNotFoundError:
        return "(source tree)"


@cache
def environment() -> jinja2.Environment:
    folder = Path(fuse.templates.__path__[0])
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
