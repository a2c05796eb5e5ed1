"""Results that depend on buffers only, kept from call to call until a buffer changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fuse.remembered import at_forget

_LIMIT = 64
_kept: OrderedDict[Hashable, Tensor] = OrderedDict()


def kept(tensors: Sequence[Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it gave when ``key`` was the same and every one of ``tensors`` had the content that it has now.

    torch counts a tensor's versions up with every write; tensors of inference mode have no count, so nothing is kept of
    them. A weak reference to a storage keeps its number from being used again.
    """
    if any(t.is_inference() for t in tensors):
        return make()
    state = (key, *(_state(t) for t in tensors))
    if state not in _kept:
        _kept[state] = make()
        if len(_kept) > _LIMIT:
            _kept.popitem(last=False)
    _kept.move_to_end(state)
    return _kept[state]


at_forget(_kept.clear)


def _state(t: Tensor) -> Hashable:
    return (StorageWeakRef(t.untyped_storage()), t._version, t.storage_offset(), t.dtype, tuple(t.shape), t.stride())
