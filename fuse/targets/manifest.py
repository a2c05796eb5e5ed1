"""What a built kernel was made of: the key in its name, and the digests beside it.

The manifest is a function of what it describes: whoever has that compares texts, and reads none that may be broken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

FORMAT = 1


def key(source: str, depends: str) -> str:
    """Of a kernel: its source, and whatever else its binary depends on."""
    return digest(f"{depends}\0{source}".encode())


def digest(data: bytes) -> str:
    """As names have it."""
    return hashlib.sha256(data).hexdigest()[:20]


def manifest(files: Mapping[str, bytes], depends: str) -> str:
    """Of ``files``, by name."""
    digests = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return json.dumps({"format": FORMAT, "files": digests, "depends": depends.split("\n")}, indent=1) + "\n"


def depends(text: bytes) -> str | None:
    """What the manifest ``text`` says that its files depend on; None where it is none."""
    try:
        return "\n".join(json.loads(text)["depends"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
