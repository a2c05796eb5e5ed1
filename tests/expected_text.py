"""Texts as they were accepted: FUSE_ACCEPT=1 writes them anew; read the diff before it is committed."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

ACCEPT = "FUSE_ACCEPT"


def compare(file: Path, text: str) -> None:
    """Fails with a diff where ``text`` is not what ``file`` holds."""
    if os.environ.get(ACCEPT) == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    accepted = file.read_text() if file.exists() else ""
    if text != accepted:
        name = f"{file.parent.name}/{file.name}"
        lines = difflib.unified_diff(accepted.splitlines(), text.splitlines(), name, "now", lineterm="")
        pytest.fail(f"{ACCEPT}=1 accepts:\n" + "\n".join(lines), pytrace=False)
