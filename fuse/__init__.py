"""fuse: the attention in your model, whatever its spelling, as one generated kernel.

``torch.compile(model, backend="fuse")`` needs no import of this package; what is here is for looking inside.

Importing it does not import torch: the shell's ``python -m fuse --help`` waits for nothing. What registers itself with torch,
such as the operators that a saved program calls, does so as soon as both are imported, in whatever order.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fuse import trainer
from fuse.when_imported import when_imported

if TYPE_CHECKING:
    from fuse.public import (
        ContextParallel,
        FuseError,
        Options,
        Report,
        Site,
        Transformed,
        explain,
        gather_sequence,
        inductor_configs,
        report,
        reset,
        save_library,
        shard_sequence,
        transform,
    )

__version__ = "0.1.0"
__all__ = [
    "ContextParallel",
    "FuseError",
    "Options",
    "Report",
    "Site",
    "Transformed",
    "explain",
    "gather_sequence",
    "inductor_configs",
    "report",
    "reset",
    "save_library",
    "shard_sequence",
    "transform",
]

_WITHOUT_TORCH = ("__main__", "cli", "errors", "settings", "trainer", "when_imported")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Import binds each submodule to its name here, which for ``fuse.report`` is that of a function."""
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


if not TYPE_CHECKING:  # which would take any name for known

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load()
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load(torch: ModuleType | None = None) -> None:
    if torch is not None and _is_importing_torch():
        return  # that module is not whole yet; names are still loaded when they are asked for
    from fuse import public

    globals().update({name: getattr(public, name) for name in __all__})


def _is_importing_torch() -> bool:
    """Whether a module of fuse is what imports torch, as where somebody begins with ``import fuse.ir.spec``."""
    rooms = {name.split(".")[1] for name in sys.modules if name.startswith("fuse.")}
    return not rooms <= set(_WITHOUT_TORCH)


sys.modules[__name__].__class__ = _Package
trainer.make_known()
when_imported("torch", _load)
