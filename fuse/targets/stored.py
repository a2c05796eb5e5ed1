"""What lies in a folder of kernels, by name, and whether it is whole, judged by what it holds alone.

kernel   <name>-<key> with its source, .so, .json (the manifest) and .lock: it is built
source   <name>_<digest of it>.<suffix>: its compiler keeps its results elsewhere
record   verdict-<key>.json, tuned-<key>.json
partial  .build-<kernel>-…, .write-…: of a build, or of a file that is being written
foreign  nothing of fuse
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fuse.targets.files import UNFINISHED, content
from fuse.targets.manifest import depends, digest, key, manifest
from fuse.targets.sealed import opened

Kind = Literal["kernel", "source", "record", "partial", "foreign"]
BUILDING = ".build-"
LIBRARY, MANIFEST, LOCK = ".so", ".json", ".lock"
_KEY = "[0-9a-f]{20}"
_RECORD, _SOURCE, _KERNEL = (re.compile(p) for p in (rf"(verdict|tuned)-{_KEY}\.json", rf"\w+_{_KEY}\.\w+", rf"\w+-{_KEY}"))
_BUILD = re.compile(rf"{re.escape(BUILDING)}(\w+-{_KEY})-\w+")
_REMOVED = (MANIFEST, LIBRARY, "", LOCK)  # in this order, "" for the source: without its manifest nothing is taken for whole


@dataclass(frozen=True)
class Stored:
    """What is stored of one ``name``: a kernel's stem, or the name of a file."""

    folder: Path
    name: str
    kind: Kind

    @property
    def paths(self) -> list[Path]:
        """What there is now, in the order in which it is safe to remove it."""
        if self.kind != "kernel":
            path = self.folder / self.name
            return [path] if path.exists() or path.is_symlink() else []
        order = {end: place for place, end in enumerate(_REMOVED)}
        return sorted(self.folder.glob(f"{self.name}.*"), key=lambda path: order.get(path.suffix, order[""]))

    @property
    def lock(self) -> Path | None:
        """What a build of it holds."""
        if self.kind == "kernel":
            return self.folder / f"{self.name}{LOCK}"
        build = _BUILD.fullmatch(self.name)
        return self.folder / f"{build[1]}{LOCK}" if build else None

    def contents(self) -> dict[str, bytes | None]:
        return {path.name: content(path) for path in self.paths if path.suffix != LOCK}


def stored(folder: Path) -> Iterator[Stored]:
    """All of a folder of kernels, each name once."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for kind, name in dict.fromkeys(map(kind_of, names)):
        yield Stored(folder, name, kind)


def kind_of(file: str) -> tuple[Kind, str]:
    """Of the name of a file, and under which name it is stored."""
    stem = file.partition(".")[0]
    if _RECORD.fullmatch(file):
        return "record", file
    if _SOURCE.fullmatch(file):
        return "source", file
    if _KERNEL.fullmatch(stem):
        return "kernel", stem
    return ("partial" if file.startswith((BUILDING, UNFINISHED)) else "foreign"), file


def never_built(contents: Mapping[str, bytes | None]) -> bool:
    """Of a kernel: there is its source at most, as after a build that failed."""
    return not any(name.endswith((LIBRARY, MANIFEST)) for name in contents)


def problem(kind: Kind, name: str, contents: Mapping[str, bytes | None]) -> str:
    """What is wrong with ``contents``, by file, of what is stored under ``name``; "" where it is whole."""
    files = {file: data for file, data in contents.items() if data is not None}
    if unread := sorted(set(contents) - set(files)):
        return f"{unread[0]} is no file that can be read"
    if kind == "record":
        return "" if opened(files.get(name)) is not None else "it is not as it was written"
    if kind == "source":
        return "" if f"{digest(files.get(name, b''))}." in name else "it is not as it was written"
    return _problem_of_kernel(name, files)


def _problem_of_kernel(name: str, files: dict[str, bytes]) -> str:
    library, text = files.pop(f"{name}{LIBRARY}", None), files.pop(f"{name}{MANIFEST}", None)
    if len(files) != 1:
        return "its source is gone" if not files else "it has more files than one kernel has"
    ((file, source),) = files.items()
    if library is None or text is None:
        return f"its {'library' if library is None else 'manifest'} is gone"
    made_with = depends(text)
    if made_with is None:
        return "its manifest cannot be read"
    if not name.endswith(f"-{key(source.decode(errors='replace'), made_with)}"):
        return "its source is not the one that it is named for"
    whole = manifest({file: source, f"{name}{LIBRARY}": library}, made_with).encode()
    return "" if whole == text else "its library is not the one that was built"
