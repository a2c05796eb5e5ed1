"""A model named on the command line, and its call: ``module:callable``, ``file.py:callable``, or a transformers type."""

from __future__ import annotations

from fuse.models import builders, transformers_types
from fuse.models.call import ModelCall, Wanted, to

__all__ = ["ModelCall", "Wanted", "load", "to"]


def load(name: str, wanted: Wanted, *, weights: bool = True) -> ModelCall:
    """``weights``: of a transformers type, drawn at random; without, memory for them is reserved but never touched.

    Raises UnknownModel, UnusableModel, BuilderTakes and BuilderFailed.
    """
    if ":" in name or builders.is_file(name):
        return builders.load(name, wanted)
    return transformers_types.load(name, wanted, weights)
