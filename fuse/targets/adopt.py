"""Takes into the cache what another process has stored in its own."""

from __future__ import annotations

from collections.abc import Mapping

from fuse.settings import settings
from fuse.targets.files import write_atomically
from fuse.targets.lock import Held, locked
from fuse.targets.private import NotPrivate, check_folders, make_private
from fuse.targets.stored import MANIFEST, Stored, kind_of, problem


class Refused(Exception):
    """Nothing was taken; the message says why."""


def take(target: str, name: str, files: Mapping[str, bytes]) -> None:
    """Stores ``files`` under ``name`` in the folder of ``target``; what is there and whole is left as it is.

    Raises Refused where they are not whole or not under that name, and OSError.
    """
    folder = settings().cache_dir / target
    if not target.isidentifier() or any("/" in file or "\\" in file for file in files):
        raise Refused("it is no artifact of fuse")
    kinds = {kind_of(file) for file in files}
    if len(kinds) != 1 or (found := kinds.pop())[1] != name or found[0] not in ("kernel", "source", "record"):
        raise Refused("it is no artifact of fuse")
    kept = Stored(folder, name, found[0])
    if why := problem(kept.kind, name, files):
        raise Refused(why)
    try:
        check_folders(folder)
        make_private(folder)
        if kept.lock is None:
            _write(kept, files)
        else:
            with locked(kept.lock):
                _write(kept, files)
    except (NotPrivate, Held) as error:
        raise Refused(str(error)) from error


def _write(kept: Stored, files: Mapping[str, bytes]) -> None:
    """The manifest last: without it, what is there is not whole."""
    if problem(kept.kind, kept.name, kept.contents()):
        for file in sorted(files, key=lambda file: file.endswith(MANIFEST)):
            write_atomically(kept.folder / file, files[file])
