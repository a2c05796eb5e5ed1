"""What buffers of the model hold while Dynamo compiles, and the guards that have it compile anew when they are written."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from fuse.memoize import at_forget
from fuse.passes.policy import Contents
from fuse.passes.read.graph import PLAIN, is_state
from fuse.torch_private import FakeTensor, disable_current_modes, given_for, guard_input, source_name, version


class Buffers(Contents):
    """Of the graph's inputs, buffers that want no gradient and that the graph does not write.

    A guard compares what such a buffer holds with what it held, which is kept for that, whenever torch has counted a write or
    another tensor stands in its place: layers that are compiled one by one have each its own.
    """

    def of(self, node: Node) -> Tensor | None:
        x = given_for(node)
        if type(x) not in PLAIN or isinstance(x, FakeTensor) or x.requires_grad or x.is_inference() or x.is_meta:
            return None
        known = is_state(node) and source_name(node) not in _written
        return x.detach() if known else None

    def rely(self, node: Node) -> bool:
        return guard_input(node, holds(given_for(node), source_name(node)), "what fuse has read of it")


_written: set[str] = set()  # where buffers were that did change: nothing is known of them from then on
at_forget(_written.clear)


def holds(x: Tensor, name: str) -> Callable[[Tensor], bool]:
    """A function of tensors: whether one holds what ``x`` holds now. ``name``: what is noted where it does not."""
    with disable_current_modes():
        held = x.detach().clone()
    seen: dict[int, tuple[weakref.ref[Tensor], int]] = {id(x): (weakref.ref(x), version(x))}

    def check(y: Tensor) -> bool:
        found = seen.get(id(y))
        if found is not None and found[0]() is y and found[1] == version(y):
            return True
        if y.is_inference() or not torch.equal(held, y):
            _written.add(name)
            return False
        seen[id(y)] = weakref.ref(y), version(y)
        return True

    return check
