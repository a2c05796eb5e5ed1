"""Results that depend on buffers only, cached from call to call until a buffer changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fuse.memoize import at_forget
from fuse.torch_private import version

_LIMIT = 64
_results: OrderedDict[Hashable, Tensor] = OrderedDict()


def cached(tensors: Sequence[Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it gave when ``key`` was the same and every one of ``tensors`` had the content that it has now.

    torch counts a tensor's versions up with every write; tensors of inference mode have no count, so nothing is cached of
    them. A weak reference to a storage keeps its number from being used again.
    """
    if any(t.is_inference() for t in tensors):
        return make()
    state = (key, *(_state(t) for t in tensors))
    if state not in _results:
        _results[state] = make()
        if len(_results) > _LIMIT:
            _results.popitem(last=False)
    _results.move_to_end(state)
    return _results[state]


at_forget(_results.clear)


def _state(t: Tensor) -> Hashable:
    return (StorageWeakRef(t.untyped_storage()), version(t), t.storage_offset(), t.dtype, tuple(t.shape), t.stride())
