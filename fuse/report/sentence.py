"""Masks in plain words: "no key behind its query" beside ``k <= q``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from fuse.ir.expr import Expr
from fuse.report.wording import Words, hidden, members

_NAME = r"([\w.']+)"
_KNOWN = (
    (r"k <= q", "causal: a query sees the keys up to its own place"),
    (r"k < q", "a query sees the keys before its own place, without it"),
    (r"k <= q \+ kv_len - q_len", "causal, counted from the end: the last query sees every key"),
    (r"q - k < (\d+|\w+)", "a window: not farther back than {0} places, its own included"),
    (r"k - q <= (\d+|\w+)", "not farther ahead than {0} places"),
    (r"abs\(q - k\) < (\d+|\w+)", "a window on both sides: nearer than {0} places"),
    (r"k < (\d+)", "the first {0} keys"),
    (rf"{_NAME}\[q\] == {_NAME}\[k\]|{_NAME}\[k\] == {_NAME}\[q\]", "keys that have the same {0} as the query"),
    (rf"{_NAME}\[k\](?: != 0)?", "keys that {0} keeps"),
    (rf"{_NAME}\[q, k\](?: != 0)?", "entries that {0} keeps"),
    (rf"k >= {_NAME}\[q\]", "keys from {0} of the query on"),
    (rf"k < {_NAME}\[q\]", "keys before {0} of the query"),
    (rf"k < {_NAME}", "the first {0} keys"),
    (r"q // (\d+) == k // (\d+)", "chunks: keys of the query's own {0} places"),
)


def sentences(predicate: Expr, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """For each condition that must hold: as it is written, and what that means where it is one that people know, or ""."""
    words = Words(names, hidden(predicate))
    for condition in members(predicate, "and"):
        yield (text := words(condition)), _meant(text)


def _meant(text: str) -> str:
    for pattern, words in _KNOWN:
        if found := re.fullmatch(pattern, text):
            named = [group for group in found.groups() if group is not None]
            if len(named) < 2 or len(set(named)) == 1:
                return words.format(*named)
    return ""
