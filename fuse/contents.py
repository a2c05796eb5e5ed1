"""What buffers of the model hold while Dynamo compiles, and the guards that have it compile anew when they are written."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, MutableMapping

from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from fuse.memoize import at_forget
from fuse.passes.policy import Contents
from fuse.passes.read.graph import PLAIN, is_state
from fuse.torch_private import FakeTensor, given_for, guard_input, source_name, version


class Buffers(Contents):
    """Of the graph's inputs, buffers that want no gradient and that the graph does not write.

    A guard looks again at what such a buffer holds whenever torch has counted a write or another tensor stands in its place:
    layers that are compiled one by one have each its own.
    """

    def of(self, node: Node) -> Tensor | None:
        x = given_for(node)
        if type(x) not in PLAIN or isinstance(x, FakeTensor) or x.requires_grad or x.is_inference() or x.is_meta:
            return None
        known = is_state(node) and source_name(node) not in _written and x not in _unset
        return x.detach() if known else None

    def rely(self, node: Node, holds: Callable[[Tensor], bool]) -> bool:
        held = Held(given_for(node), holds, source_name(node))
        return guard_input(node, held.by, held.unchanged, f"what {held.name} holds, of which fuse has read a formula")


_unset: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


def unset(tensors: Iterable[Tensor]) -> None:
    """Says that nobody has given these a content yet: memory that a model got for its structure alone."""
    _unset.update(dict.fromkeys(tensors, True))


_written: set[str] = set()  # where buffers were that did change: nothing is known of them from then on
at_forget(_written.clear)


class Held:
    """What ``x`` holds now, and who else.

    holds  asked of a tensor that was not seen before, or was written since
    name   of its place in the model, which is noted as soon as something else is found there
    """

    def __init__(self, x: Tensor, holds: Callable[[Tensor], bool], name: str) -> None:
        self.name, self._holds = name, holds
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._see(x)

    def by(self, y: Tensor) -> bool:
        """Whether ``y`` holds the same."""
        ref, seen = self._seen.get(id(y), (None, 0))
        if ref is not None and ref() is y and seen == version(y):
            return True
        if y.is_inference() or not self._holds(y.detach()):
            _written.add(self.name)
            return False
        self._see(y)
        return True

    def unchanged(self) -> bool:
        """Whether all that were found to hold it still do."""
        alive = [y for ref, _ in self._seen.values() if (y := ref()) is not None]
        return all(map(self.by, alive))

    def _see(self, y: Tensor) -> None:
        self._seen[id(y)] = weakref.ref(y), version(y)
