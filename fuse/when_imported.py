"""What is done to a module as soon as it is imported, so that fuse need not import what its user may not want."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Do = Callable[[ModuleType], None]


def when_imported(name: str, do: Do) -> None:
    """``do`` with the module ``name``: now, if somebody has imported it, else once, right behind its last line."""
    if name in sys.modules:
        do(sys.modules[name])
    elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, do))


class _Watch(MetaPathFinder):
    def __init__(self, name: str, do: Do) -> None:
        self.name, self.do = name, do

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As whoever else finds it, with our line behind its last."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.do(module)

            loader.exec_module = exec_module
        return spec
