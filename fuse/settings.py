"""What holds for the whole process, from FUSE_CACHE_DIR and FUSE_DUMP: kernels are shared by all that was compiled in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fuse.errors import InvalidVariable, NoHome


@dataclass(frozen=True)
class Settings:
    """
    cache_dir  where rendered sources and built kernels are kept
    dump       folder that receives every kernel as a file that runs alone; an edited file there is used in its place
    """

    cache_dir: Path
    dump: Path | None


def settings() -> Settings:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fuse"
    cache = os.environ.get("FUSE_CACHE_DIR") or default
    dump = os.environ.get("FUSE_DUMP")
    return Settings(_folder("FUSE_CACHE_DIR", Path(cache)), _folder("FUSE_DUMP", Path(dump)) if dump else None)


def _folder(variable: str, path: Path) -> Path:
    try:
        path = path.expanduser().absolute()
    except RuntimeError as error:
        raise NoHome(name=variable, value=str(path)) from error
    if path.exists() and not path.is_dir():
        raise InvalidVariable(name=variable, value=str(path), allowed="a folder, which may not exist yet", hint="")
    return path
