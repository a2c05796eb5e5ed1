"""``torch_compile_backend="fuse"``: Trainer of transformers hands the name to accelerate, which takes names of
its own list only. When accelerate is imported, ours is added to that list.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MODULE, _NAME = "accelerate.utils.dataclasses", "FUSE"


def make_known() -> None:
    """To accelerate, now or when it is imported: fuse does not import what the user does not."""
    if _MODULE in sys.modules:
        _add(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As whoever else finds it, with our line behind its last."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _add(module)

            loader.exec_module = exec_module
        return spec


def _add(module: ModuleType) -> None:
    """A member of an enumeration that is closed; one that has it, or is made in another way, stays as it is."""
    backends: Any = getattr(module, "DynamoBackend", None)
    with contextlib.suppress(AttributeError, TypeError):
        if _NAME not in backends._value2member_map_:
            member = str.__new__(backends, _NAME)
            member._name_ = member._value_ = _NAME
            backends._value2member_map_[_NAME] = backends._member_map_[_NAME] = member
            backends._member_names_.append(_NAME)
