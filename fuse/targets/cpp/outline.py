"""How a C++ source reads from the top: an outline after its header, and no line of code beyond what a screen shows."""

from __future__ import annotations

import re

from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.source import CONTENTS, ENTRY, READ, operand_lines

WIDTH = 128
_ONE_LINE = re.compile(r"( *)([^{}]*\)(?: const)?) \{ (.*;) \}")  # a function, or a block after its condition
# What a source may hold: how its definition begins, and what it is; in the order in which it is found.
_PARTS = (
    (r"typedef R VR ", "VR", "vectors, memory, functions: the same in every kernel, up to Call"),
    (r"struct Call ", "Call", "the arguments of a call"),
    (r"struct BatchIndex ", "BatchIndex", "one batch index: where its operands begin"),
    (r"static int64_t lower_key\(", "lower_key", "edit: the first key that a query may see"),
    (r"static int64_t upper_key\(", "upper_key", "edit: one past the last key that a query may see"),
    (r"struct Destinations ", "Destinations", "where gradients go"),
    (r"struct KeyPart ", "KeyPart", "keys whose gradients a thread sums"),
    (r"struct Matrix ", "Matrix", "products of bfloat16"),
    (r"struct Packed ", "Packed", "keys and values of one head, as tiles are read"),
    (r"struct PackedKeys ", "PackedKeys", "keys and values, as tiles are read"),
    (r"struct PackedQueries ", "PackedQueries", "queries and gradients of results, as tiles are read"),
    (r"template <int N> struct Rows ", "Rows", "what is known of the queries of a block"),
    (r"template <int N> struct Tile ", "Tile", "what functions of entries are given: queries, and some keys"),
    (r"void score_full\(", "score_full", "edit: the score of an entry, lanes are queries"),
    (r"void score_partial\(", "score_partial", "edit: the same where the mask hides some"),
    (r"void score_exact\(", "score_exact", "edit: the same as eager rounds it"),
    (r"void weigh_rows\(", "weigh_rows", "edit: the weight of an entry, lanes are queries"),
    (r"static void write_block\(", "write_block", "a block of queries against its keys, lanes are queries"),
    (r"void weigh\(", "weigh", "edit: the weight of an entry, lanes are queries"),
    (r"struct ScoreFull ", "ScoreFull", "edit: the score of an entry, lanes are keys"),
    (r"struct ScorePartial ", "ScorePartial", "edit: the same where the mask hides some"),
    (r"struct Weight ", "Weight", "edit: the weight of an entry, lanes are keys"),
    (r"struct Visible ", "Visible", "edit: the mask, lanes are keys"),
    (r"void entries_full\(", "entries_full", "edit: weight and gradient of an entry, lanes are queries"),
    (r"void entries_partial\(", "entries_partial", "edit: the same where the mask hides some"),
    (r"struct EntriesFull ", "EntriesFull", "edit: weight and gradient of an entry, lanes are keys"),
    (r"struct EntriesPartial ", "EntriesPartial", "edit: the same where the mask hides some"),
    (r"INLINE void multiply\(", "multiply", "a product of small matrices"),
    (r"struct InPlace ", "InPlace", "few queries: keys and values where they lie"),
    (r"static bool block\(", "block", "tiles of keys, one after the other"),
    (r"static void attend\(", "attend", "a block of queries against a part of the keys"),
    (r"static void queries_in\(", "queries_in", "a block of queries against its keys, lanes are queries"),
    (r"struct QueryBlock ", "QueryBlock", "a block of queries against its keys, by matrix products"),
    (r"struct Backward ", "Backward", "how the gradients are shared by the threads"),
    (rf'extern "C" .*int {ENTRY}\(', ENTRY, "the entry"),
)


def finished(text: str, header: str, spec: AttentionSpec | TileMap, result: str = "") -> str:
    """The source with an outline after its header, in lines of WIDTH. ``result``: what it gives, if not that of ``spec``."""
    body = text[len(header) :]
    lines = [*operand_lines(spec, result), READ, CONTENTS, *_contents(body)]
    outline = "\n".join(f"// {line}" for line in lines)
    return f"{header}\n{outline}{wrapped(body)}"


def _contents(body: str) -> list[str]:
    found = [(m.start(), name, what) for begin, name, what in _PARTS if (m := re.search(begin, body))]
    return [f"  {name:<16} {what}" for _, name, what in sorted(found)]


def wrapped(text: str) -> str:
    """Lines beyond WIDTH are broken around a body, after a comma or before an operator; comments and directives are left."""
    return "\n".join(_broken(line) for line in text.split("\n"))


def _broken(line: str) -> str:
    start = line.lstrip()
    if len(line) <= WIDTH or start.startswith(("//", "#")) or '"' in line:
        return line
    if whole := _ONE_LINE.fullmatch(line):
        margin, head, body = whole.groups()
        return "\n".join((_broken(f"{margin}{head} {{"), _broken(f"{margin}    {body}"), f"{margin}}}"))
    indent = len(line) - len(start)
    breaks = [m.end() for m in re.finditer(r",(?= )| (?=[-+*?:&|] )|;(?= )", line[:WIDTH]) if m.end() > indent + 8]
    if not breaks:
        return line
    rest = " " * (indent + 4) + line[breaks[-1] :].lstrip()
    return f"{line[: breaks[-1]].rstrip()}\n{_broken(rest)}"
