"""What torch.compiler.save_cache_artifacts() takes along of fuse, and load_cache_artifacts() brings.

An artifact is all that is stored under one name: a kernel with its manifest, say. What is loaded is taken for a cache's file
that somebody else has written: it has to be whole, and a kernel is found only by the compiler, flags and processor in its name.

torch has no lock here for whoever builds in threads: an artifact that comes while artifacts are saved may be left for the next
time.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping
from functools import cache
from typing import Any

from fuse.targets import adopt
from fuse.torch_private import artifact_manager

log = logging.getLogger(__name__)
TYPE = "fuse"  # also of the list of names in torch's CacheInfo: fuse_artifacts


def keep(target: str, name: str, files: Mapping[str, bytes]) -> None:
    """Has what is stored under ``name`` saved with the artifacts of this process. ``files``: its contents, by name."""
    try:
        manager().record_artifact(TYPE, f"{target}/{name}", packed(files))
    except Exception:  # not even a torch that has changed costs anybody a kernel
        log.debug("%s will not be among the saved artifacts", name, exc_info=True)


def packed(files: Mapping[str, bytes]) -> bytes:
    """The same bytes for the same files."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packing:
        for name, data in files.items():
            packing.writestr(zipfile.ZipInfo(name), data)
    return archive.getvalue()


def unpacked(archive: bytes) -> dict[str, bytes]:
    """Raises zipfile.BadZipFile."""
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


@cache
def manager() -> Any:
    """What keeps artifacts for torch, which knows those of fuse from then on; None where torch has another."""
    try:
        return artifact_manager(TYPE, _load)
    except Exception:
        log.warning("torch.compiler.save_cache_artifacts() will not have fuse's kernels: torch has changed", exc_info=True)
        return None


def _load(key: str, archive: bytes) -> None:
    """What cannot be taken costs a build, and nobody the other artifacts."""
    try:
        target, _, name = key.partition("/")
        adopt.take(target, name, unpacked(archive))
    except (adopt.Refused, OSError, zipfile.BadZipFile) as error:
        log.warning("a saved artifact, %s, is not used: %s", key, error)


manager()
