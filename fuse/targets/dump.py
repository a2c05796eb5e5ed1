"""FUSE_DUMP: a folder that receives every kernel's source; a file that is there already is used as it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fuse.memoize import at_forget
from fuse.report.runs import Runs
from fuse.settings import settings
from fuse.targets import dump_index
from fuse.targets.cache import BuildFailed
from fuse.targets.files import content, write_atomically

log = logging.getLogger(__name__)
_announced: set[Path] = set()
at_forget(_announced.clear)


@dataclass(frozen=True)
class DumpedSource:
    """A kernel's text. ``edited``: the file that it comes from, where that is not what was rendered; errors cite that."""

    text: str
    edited: Path | None = None

    def runs(self, file: Path) -> Runs:
        """What is to be said of a kernel of this text, in ``file``."""
        return Runs("kernel", file) if self.edited is None else Runs("edited kernel", self.edited)

    def refused(self, why: Exception) -> BuildFailed:
        """``why`` it cannot be built, which names the file where that is not ours."""
        if self.edited is None:
            return BuildFailed(str(why))
        remedy = "Correct it, or delete it to have the kernel as it was rendered"
        return BuildFailed(f"the edited kernel {self.edited} cannot be built. {remedy}. {why}")


def dumped(name: str, rendered: str, suffix: str) -> DumpedSource:
    """What is to be built of a ``rendered`` kernel. Raises BuildFailed where its file in the folder cannot be read."""
    folder = settings().dump
    if folder is None:
        return DumpedSource(rendered)
    path = folder / f"{name}-{dump_index.digest(rendered)}{suffix}"
    try:
        if not path.exists():
            _written(folder, path, rendered)
        data = content(path)
        if data is None:
            raise OSError("it is no file")
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BuildFailed(f"FUSE_DUMP: {path} is no source that can be read and written: {error}. Move it away") from error
    dump_index.write(folder)
    if text == rendered:
        return DumpedSource(text)
    _announce(path)
    return DumpedSource(text, path)


def _announce(path: Path) -> None:
    """Once, that somebody's own kernel is taken."""
    if path not in _announced:
        _announced.add(path)
        log.warning("fuse takes the edited kernel %s in place of the one that it rendered", path)


def _written(folder: Path, path: Path, text: str) -> None:
    """Raises BuildFailed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise BuildFailed(
            f"FUSE_DUMP={str(folder)!r} cannot be written to: {error}. Set another folder, or unset it"
        ) from error
