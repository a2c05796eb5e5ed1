"""In which order of dimensions tensors lie in memory: the result as its consumer reads it, a bias as the kernel does.

Models write attention as (batch, head, position, feature) and go on in (batch, position, head, feature): stored so from
the start, ``transpose(1, 2).contiguous()`` costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch.fx import Node

from fuse.ir import expr
from fuse.ir.expr import Expr, Load
from fuse.ir.spec import AttentionSpec
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.read.graph import operator_name, tensor_of
from fuse.passes.read.trace import Value, computed
from fuse.torch_private import hint

# Only what accepts any strides may stand behind the transposition: ``view`` would not.
_RESTRIDE = {"contiguous", "reshape", "clone", "flatten"}


def memory_order(root: Node) -> tuple[int, ...]:
    """The dimensions of ``root`` from outermost to innermost: as it is read next, or else as eager has it."""
    value = tensor_of(root)
    if value is None:
        return ()
    users = list(root.users)
    if len(users) == 1 and users[0].users and all(operator_name(u) in _RESTRIDE for u in users[0].users):
        order = _permutation(users[0], value.dim())
        if order is not None:
            return tuple(order)
    steps = [n if isinstance(n, int) else hint(n) or 0 for n in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda d: -steps[d]))  # what comes behind may rely on it, as ``view`` does


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


def put_keys_innermost(lifted: Lifted, _: SiteContext) -> Lifted:
    """Operands of both positions are copied once where neighbouring keys lie far apart, as in a bias of shape (q, k, head).

    Every head and layer reads such an operand; in its own order each cache line would be fetched once per head.
    """
    spec, leaves = lifted.spec, list(lifted.leaves)
    for number, leaf in enumerate(leaves):
        order = _order_with_keys_last(spec, number, leaf)
        if order is not None:
            leaves[number] = computed([leaf], lambda x, order=order: x.permute(order).contiguous())
            spec = _reordered(spec, number, order)
    return dataclasses.replace(lifted, spec=spec, leaves=tuple(leaves))


def _order_with_keys_last(spec: AttentionSpec, number: int, leaf: Value) -> tuple[int, ...] | None:
    loads = [n for n in expr.walk(*spec.roots().values()) if isinstance(n, Load) and n.operand == number]
    key = expr.index("k")
    found = {n.coords.index(key) if key in n.coords else -1 for n in loads}
    both = all({"q", "k"} <= expr.axes(n) for n in loads)
    if len(found) != 1 or not both or loads[0] in (spec.query, spec.key, spec.value):
        return None
    dim, rank = found.pop(), len(leaf.shape)
    if dim < 0 or dim == rank - 1 or leaf.meta.stride(dim) == 1:
        return None
    return (*(d for d in range(rank) if d != dim), dim)


def _reordered(spec: AttentionSpec, number: int, order: tuple[int, ...]) -> AttentionSpec:
    def rule(n: Expr) -> Expr | None:
        if isinstance(n, Load) and n.operand == number:
            return Load(n.dtype, number, tuple(n.coords[d] for d in order))
        return None

    return spec.mapped(lambda root: expr.rewrite(root, rule))
