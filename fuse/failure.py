"""An exception of the user's code in one line, with the place to look at."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from traceback import FrameSummary, extract_tb

_DYNAMO = "torch._dynamo"
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))


def told(error: BaseException) -> str:
    """ "KeyError: 'b' (model.py:13, in build: return widths['b'])": of what Dynamo has wrapped, the error inside."""
    inner = _unwrapped(error)
    said = next(iter(str(inner).strip().splitlines()), "")
    text = f"{type(inner).__name__}: {said}" if said else type(inner).__name__
    frame = place(error)
    if frame is None:
        return text
    return f"{text} ({Path(frame.filename).name}:{frame.lineno}, in {frame.name}: {frame.line})"


def place(error: BaseException) -> FrameSummary | None:
    """The innermost line of the user's own files; else of what is neither torch nor fuse."""
    frames = list(_frames(error))
    own = [f for f in frames if not f.filename.startswith((*_INSTALLED, "<"))]
    return next(reversed(own or frames), None)


def _unwrapped(error: BaseException) -> BaseException:
    while type(error).__module__.startswith(_DYNAMO) and (within := error.__cause__ or error.__context__) is not None:
        error = within
    return error


def _frames(error: BaseException) -> Iterator[FrameSummary]:
    """Outermost first, without torch's and ours. Dynamo knows those of the code that it reads, which is not running."""
    passed_through = tuple(_folder(name) for name in ("torch", "fuse"))
    for frame in (*extract_tb(error.__traceback__), *(getattr(error, "real_stack", None) or ())):
        if not frame.filename.startswith((*passed_through, "<frozen")):
            yield frame


def _folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return "" if spec is None or spec.origin is None else str(Path(spec.origin).parent)
