"""What a rewritten graph takes for granted of its inputs, as a node that looks at them in every call.

torch.compile and torch.export check for themselves. A traced module checks nothing, and an attention that was read for some
sizes would be another function for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, has_side_effect
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fuse.errors import OtherInputs


def assume(gm: GraphModule, fakes: Sequence[Any], shapes: ShapeEnv) -> None:
    """Has each call of ``gm`` raise OtherInputs where its inputs are not as ``fakes``, one for each placeholder."""
    leaves = pytree.tree_leaves(list(fakes))
    kinds = [(x.dtype, str(x.device), x.dim()) if isinstance(x, Tensor) else x for x in leaves]
    guards = shapes.produce_guards_expression([x for x in leaves if isinstance(x, Tensor)], ignore_static=False)
    placeholders = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(placeholders[-1]):
        gm.graph.call_function(check, (placeholders, kinds, guards or "True"))


@has_side_effect
@torch.compiler.disable
def check(inputs: Sequence[Any], kinds: Sequence[Any], guards: str) -> None:
    """Raises OtherInputs.

    kinds   of each leaf of ``inputs``: (dtype, device, number of dimensions), or the value of what is no tensor
    guards  what must hold of the sizes, as torch writes it
    """
    leaves = pytree.tree_leaves(list(inputs))
    found = [(x.dtype, str(x.device), x.dim()) if isinstance(x, Tensor) else x for x in leaves]
    for got, kind in zip(found, kinds, strict=True):
        if got != kind:
            raise OtherInputs(assumed=kind, got=got)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not ShapeEnv().evaluate_guards_expression(guards, tensors):
        raise OtherInputs(assumed=_failed(guards, tensors), got=", ".join(str(tuple(x.shape)) for x in tensors))


def _failed(guards: str, tensors: Sequence[Tensor]) -> str:
    """The first of the conditions that does not hold."""
    shapes = ShapeEnv()
    return next(g for g in guards.split(" and ") if not shapes.evaluate_guards_expression(g, tensors))
