"""In which order of dimensions the result lies in memory: the one in which its consumer reads it.

Models write attention as (batch, head, position, feature) and go on in (batch, position, head, feature): stored so from
the start, ``transpose(1, 2).contiguous()`` costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from fuse.passes.graph import operator_name, tensor_of

# Only what accepts any strides may stand behind the transposition: ``view`` would not.
_RESTRIDE = {"contiguous", "reshape", "clone", "flatten"}


def memory_order(root: Node) -> tuple[int, ...]:
    """The dimensions of ``root`` from outermost to innermost."""
    value = tensor_of(root)
    rank = 0 if value is None else value.dim()
    users = list(root.users)
    if len(users) == 1 and users[0].users and all(operator_name(u) in _RESTRIDE for u in users[0].users):
        order = _permutation(users[0], rank)
        if order is not None:
            return tuple(order)
    return tuple(range(rank))


def _permutation(node: Node, rank: int) -> Sequence[int] | None:
    name = operator_name(node)
    args = node.args[1:]
    if name in ("transpose", "swapaxes", "swapdims") and len(args) == 2:
        a, b = args
        if isinstance(a, int) and isinstance(b, int):
            order = list(range(rank))
            order[a], order[b] = order[b], order[a]
            return order
    if name == "permute":
        given = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        found = [a % rank for a in given if isinstance(a, int)]
        if len(found) == len(given) == rank:
            return found
    return None
