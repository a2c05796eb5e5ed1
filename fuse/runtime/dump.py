"""FUSE_DUMP: a folder that receives every kernel's source; a file that is there already is used as it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fuse.options import settings
from fuse.runtime.cache import BuildFailed, content, write_atomically


@dataclass(frozen=True)
class Source:
    """A kernel's text. ``edited``: the file that it comes from, where that is not what was rendered; errors cite that."""

    text: str
    edited: Path | None = None


def dumped(name: str, rendered: str) -> Source:
    """What is to be built of a ``rendered`` kernel. Raises BuildFailed where its file in the folder cannot be read."""
    folder = settings().dump
    if folder is None:
        return Source(rendered)
    path = folder / f"{name}-{hashlib.sha256(rendered.encode()).hexdigest()[:12]}.cpp"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, rendered)
        data = content(path)
        if data is None:
            raise OSError("it is no file")
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BuildFailed(f"FUSE_DUMP: {path} is no source that can be read and written: {error}. Move it away") from error
    return Source(text) if text == rendered else Source(f"#line 1 {json.dumps(str(path))}\n{text}", path)
