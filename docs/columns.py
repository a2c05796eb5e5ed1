"""Docstrings explain names in two columns; the reference shows these as lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Extension, Object

COLUMN = re.compile(r"^(\w[\w, ]*? {2,})\S", re.MULTILINE)


class Columns(Extension):
    def on_object(self, *, obj: Object, **of_griffe: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n\n".join(map(listed, obj.docstring.value.split("\n\n")))


def listed(paragraph: str) -> str:
    """``name   what it is`` in each line as a list; other paragraphs as they are."""
    found = COLUMN.search(paragraph)
    column = len(found[1]) if found else 0
    inside = all(line[column - 1 : column].isspace() for line in paragraph.splitlines())
    return "\n".join(_items(paragraph, column)) if found and inside else paragraph


def _items(paragraph: str, column: int) -> Iterator[str]:
    for line in paragraph.splitlines():
        name, text = line[:column].strip(), line[column:]
        names = ", ".join(f"`{each}`" for each in name.split(", "))
        yield f"- {names}: {text}" if name else f"  {text}"
