"""Verdicts and tuning results on disk, which later runs and other processes take as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuse.targets import artifacts
from fuse.targets.files import content, mark_used, write_atomically
from fuse.targets.private import make_private
from fuse.targets.sealed import opened, sealed


def read(path: Path) -> dict[str, Any] | None:
    """What ``write`` has left in ``path``; None where there is none, or it is not whole."""
    data = content(path)
    body = opened(data)
    if data is not None and body is not None:
        mark_used(path)
        _kept(path, data)
    return body


def write(path: Path, body: Mapping[str, Any]) -> None:
    """Raises OSError."""
    make_private(path.parent)
    text = sealed(body)
    write_atomically(path, text)
    _kept(path, text.encode())


def _kept(path: Path, data: bytes) -> None:
    artifacts.keep(path.parent.name, path.name, {path.name: data})
