"""What was measured or decided, as a JSON text that people can read, with a digest of all else at its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def sealed(body: Mapping[str, Any]) -> str:
    """The text of ``body``, which JSON can hold."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def opened(data: bytes | None) -> dict[str, Any] | None:
    """The body of a text; None where it is not as ``sealed`` wrote it."""
    try:
        body: dict[str, Any] = json.loads(data or b"")
        del body["sha256"]
        return body if data == sealed(body).encode() else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
