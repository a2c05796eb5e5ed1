"""Paths of modules that differ in numbers, told as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def merge_paths(paths: Sequence[str]) -> str:
    """("h.0.attn", "h.1.attn", "h.2.attn") as "h.{0..2}.attn": no path is lost, none is invented."""
    patterns: dict[str, list[tuple[int, ...]]] = {}
    for path in dict.fromkeys(paths):
        patterns.setdefault(re.sub(r"\d+", "#", path), []).append(tuple(map(int, re.findall(r"\d+", path))))
    return ", ".join(_fill(pattern, box) for pattern, numbers in patterns.items() for box in _boxes(numbers))


def _boxes(numbers: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Rows of numbers as products of columns, where rows that differ in one column only become one."""
    boxes: list[tuple[tuple[int, ...], ...]] = [tuple((n,) for n in row) for row in numbers]
    for column in reversed(range(len(numbers[0]))):
        alike: dict[Any, list[int]] = {}
        for box in boxes:
            alike.setdefault((box[:column], box[column + 1 :]), []).extend(box[column])
        boxes = [(*before, tuple(sorted(merged)), *after) for (before, after), merged in alike.items()]
    return boxes


def _fill(pattern: str, box: tuple[tuple[int, ...], ...]) -> str:
    columns = map(_ranges, box)
    return re.sub("#", lambda _: next(columns), pattern)


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][-1] + 1:
            spans[-1][1:] = [n]
        else:
            spans.append([n])
    return "{" + ",".join("..".join(map(str, span)) for span in spans) + "}"
