"""Derivatives of the ops at one level of torch.func, or outside of it.

The dispatcher calls an op's autograd kernel once for each level, as it does with ATen's; what is called below autograd goes on
to the next level by itself. ``torch.autograd.Function`` would go through all levels at once.
"""

from __future__ import annotations

from typing import Any

from fuse.torch_private import SingleLevelFunction as Function
from fuse.torch_private import enable_single_level_autograd_function, transforms_active

__all__ = ["Function", "apply"]


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)``, of a subclass of ``Function``, from an autograd kernel."""
    if not transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)
