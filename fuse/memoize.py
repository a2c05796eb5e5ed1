"""What is made once for each argument, until ``forget`` is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

C = TypeVar("C", bound=Callable[..., Any])
_clears: list[Callable[[], None]] = []


def memoize(make: C) -> C:
    """As functools.cache."""
    cached: Any = cache(make)
    at_forget(cached.cache_clear)
    found: C = cached
    return found


def at_forget(clear: Callable[[], None]) -> Callable[[], None]:
    """Has ``clear`` called by ``forget``."""
    _clears.append(clear)
    return clear


def forget() -> None:
    for clear in _clears:
        clear()
