"""A model with the arguments of one call, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from fuse.torch_private import pytree


class ModelCall(NamedTuple):
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """None is as the model has it.

    layers     of every stack
    length     positions of each text
    batch      texts or images
    padding    where texts are filled up that are shorter than ``length``: they go down to half of it
    dtype      of weights, and of inputs that are floating-point
    attention  "eager", "sdpa", "flex_attention": an implementation of transformers
    """

    layers: int | None = None
    length: int | None = None
    batch: int | None = None
    padding: Literal["left", "right"] | None = None
    dtype: torch.dtype | None = None
    attention: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def to(call: ModelCall, what: torch.dtype | str) -> ModelCall:
    """The model and its tensors on a device, or as numbers of a dtype, those that are floating-point."""

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.to(what) if isinstance(what, str) or x.is_floating_point() else x

    model = call.model.to(what) if isinstance(call.model, torch.nn.Module) else call.model
    args, kwargs = pytree.tree_map_only(torch.Tensor, moved, (call.args, dict(call.kwargs)))
    return ModelCall(model, args, kwargs)
