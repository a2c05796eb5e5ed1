"""The logs of fuse, by the names that TORCH_LOGS takes: ``fuse``, ``fuse_sites`` and ``fuse_kernels``.

torch reads TORCH_LOGS at the end of its own import and raises for a name that it does not know, so they are registered by an
entry point of the group ``torch.backends``, which torch calls just before. This is a module of its own since fuse takes seconds
to import, and every program that imports torch comes through here: nothing but torch is imported, and nothing ever raised.
"""

from __future__ import annotations

import contextlib

LOG = "fuse"
ARTIFACTS = {
    "fuse_sites": "Attention sites of each graph: formula, sizes, what runs them, or why none does",
    "fuse_kernels": "Sources of the kernels that fuse generated",
}


def register() -> None:
    """Makes the names known to torch; what is known already stays as it is."""
    with contextlib.suppress(Exception):  # a torch that has changed costs nobody its import
        from torch._logging import _internal

        if not _internal.log_registry.is_log(LOG):
            _internal.register_log(LOG, LOG)
        for name, about in ARTIFACTS.items():
            if not _internal.log_registry.is_artifact(name):
                _internal.register_artifact(name, about, visible=True, off_by_default=True)
