"""``torch_compile_backend="fuse"``: Trainer of transformers hands the name to accelerate, which takes names of
its own list only. When accelerate is imported, ours is added to that list.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

from fuse.when_imported import when_imported

_MODULE, _NAME = "accelerate.utils.dataclasses", "FUSE"


def make_known() -> None:
    """To accelerate, now or when it is imported: fuse does not import what the user does not."""
    when_imported(_MODULE, _add)


def _add(module: ModuleType) -> None:
    """A member of an enumeration that is closed; one that has it, or is made in another way, stays as it is."""
    backends: Any = getattr(module, "DynamoBackend", None)
    with contextlib.suppress(AttributeError, TypeError):
        if _NAME not in backends._value2member_map_:
            member = str.__new__(backends, _NAME)
            member._name_ = member._value_ = _NAME
            backends._value2member_map_[_NAME] = backends._member_map_[_NAME] = member
            backends._member_names_.append(_NAME)
