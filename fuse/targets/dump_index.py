"""What lies beside the kernels in FUSE_DUMP's folder: ``sites.json``, the calls that they are made for, from which
``python -m fuse.alone`` makes sizes and strides; and ``index.md``, a list to read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuse.kernel.source import Header, header_of
from fuse.targets.files import content, write_atomically
from fuse.targets.lock import Held, locked

log = logging.getLogger(__name__)
INDEX, SITES, _LOCK = "index.md", "sites.json", ".lock"
_SUFFIXES = (".cpp", ".py")  # by which a source is told from what else a folder may hold
_HEAD = """# Kernels

One file each, named after what it computes. An edited file runs in the kernel's place, once it has been compared with float64;
delete it to have the kernel back. Any of them runs by itself, with the sizes and strides of the sites below:

    python -m fuse.alone FILE
"""


@dataclass(frozen=True)
class Layout:
    """How an operand lies in memory."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    spec      of the attention or of the map, as its to_json() gives it
    wanted    of gradients, the operands that they are of; () of a result or a map
    device    the type of the operands' device
    sizes     values of the spec's symbols
    where     "file.py:line" of the user's source; ``module``: its path in the model
    names     what the user's code calls the operands, "" of those that have no name
    """

    spec: str
    wanted: tuple[bool, ...]
    device: str
    sizes: tuple[int, ...]
    operands: tuple[Layout, ...]
    where: str = ""
    module: str = ""
    names: tuple[str, ...] = ()

    @staticmethod
    def of_data(data: dict[str, Any]) -> Call:
        """Of what ``asdict`` made. Raises TypeError, KeyError."""
        operands = tuple(Layout(o["dtype"], tuple(o["shape"]), tuple(o["strides"])) for o in data["operands"])
        tuples = {name: tuple(data[name]) for name in ("wanted", "sizes", "names")}
        return Call(**{**data, **tuples, "operands": operands})

    def is_of(self, header: Header) -> bool:
        """Whether the kernel of ``header`` computes it, or a part of it."""
        return (self.spec, self.wanted) == (header.spec, header.wanted)


def digest(rendered: str) -> str:
    """As names of files have it: of the text that was rendered, however it is edited since."""
    return hashlib.sha256(rendered.encode()).hexdigest()[:12]


def calls(folder: Path) -> tuple[Call, ...]:
    """What ``remember`` has left in ``folder``; () where that is not whole."""
    try:
        return tuple(map(Call.of_data, json.loads(content(folder / SITES) or b"[]")))
    except (ValueError, TypeError, KeyError):
        return ()


def remember(folder: Path, new: Sequence[Call]) -> None:
    """Adds calls to those of ``folder``."""
    _change(folder, new)


def write(folder: Path) -> None:
    """Writes the list anew: there are kernels since."""
    _change(folder, ())


def _change(folder: Path, new: Sequence[Call]) -> None:
    """A list that cannot be written costs nobody a kernel."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _LOCK):
            known = tuple(dict.fromkeys((*calls(folder), *new)))
            if new:
                write_atomically(folder / SITES, json.dumps([asdict(call) for call in known], indent=1) + "\n")
            text = "\n".join([_HEAD, *_listed(folder, known)])
            if content(folder / INDEX) != text.encode():
                write_atomically(folder / INDEX, text)
    except (OSError, Held) as error:
        log.warning("%s is not written: %s", folder / INDEX, error)


def _listed(folder: Path, known: Sequence[Call]) -> Iterator[str]:
    for path in sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES):
        text = (content(path) or b"").decode(errors="replace")
        header = header_of(text)
        if header.spec:
            yield f"## [{path.name}]({path.name}){'' if path.stem.endswith(digest(text)) else ', edited'}\n"
            yield from (f"    {line}" for line in header.formula)
            of = [c for c in known if c.is_of(header)]
            named = [f"`operand{i}` is `{name}`" for i, name in enumerate(of[0].names if of else ()) if name]
            yield f"\n{', '.join(named)}\n\nCalled by:\n" if named else "\nCalled by:\n"
            yield from _callers(header, of)
            yield ""


def _callers(header: Header, of: Sequence[Call]) -> Iterator[str]:
    """A line for each choice of sizes."""
    by_sizes: dict[tuple[int, ...], list[Call]] = {}
    for call in of:
        by_sizes.setdefault(call.sizes, []).append(call)
    for sizes, found in by_sizes.items():
        yield f"- {places(found)}: {', '.join(f'{s} = {n}' for s, n in zip(_symbols(header), sizes, strict=False))}"
    if not of:
        yield "- nobody that was noted"


def places(of: Sequence[Call]) -> str:
    """Where calls stand in the user's source, once each, be it in one layer of the model or in all; "" where nobody knows."""
    modules: dict[str, dict[str, None]] = {}
    for call in of:
        modules.setdefault(call.where, {})[call.module] = None
    several = {where: f" and {len(found) - 1} more" * (len(found) > 1) for where, found in modules.items()}
    return ", ".join(f"{where} {next(iter(found))}".strip() + several[where] for where, found in modules.items())


def _symbols(header: Header) -> list[str]:
    data = json.loads(header.spec)
    return [*(f"B{i}" for i in range(data["batch"])), "q_len", "kv_len", *data["extra"]]
