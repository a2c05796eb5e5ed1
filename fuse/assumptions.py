"""What a rewritten graph takes for granted of its inputs, as a node that looks at them in every call.

torch.compile and torch.export check for themselves. A traced module checks nothing, and an attention that was read for some
sizes would be another function for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Proxy, has_side_effect
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fuse.errors import OtherInputs


def assume(gm: GraphModule, fakes: Sequence[Any], shapes: ShapeEnv, modules: Sequence[str]) -> None:
    """Has each call of ``gm`` raise OtherInputs where its inputs are not as ``fakes``, one for each placeholder, or one of the
    ``modules``, which the graph calls no longer, has been put into another mode.
    """
    leaves = pytree.tree_leaves(list(fakes))
    kinds = [(x.dtype, str(x.device), x.dim()) if isinstance(x, Tensor) else x for x in leaves]
    guards = shapes.produce_guards_expression([x for x in leaves if isinstance(x, Tensor)], ignore_static=False)
    placeholders = gm.graph.find_nodes(op="placeholder")
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    with gm.graph.inserting_before(first):
        modes = [gm.graph.create_node("get_attr", f"{name}.training") for name in modules]
        kinds += [gm.get_submodule(name).training for name in modules]
        gm.graph.call_function(check, ([*placeholders, *modes], kinds, guards or "True"))


@has_side_effect
@torch.compiler.disable
def check(inputs: Sequence[Any], kinds: Sequence[Any], guards: str) -> None:
    """Raises OtherInputs; where it is traced it becomes a node of that graph, too.

    kinds   of each leaf of ``inputs``: (dtype, device, number of dimensions), or the value of what is no tensor
    guards  what must hold of the sizes, as torch writes it
    """
    leaves = pytree.tree_leaves(list(inputs))
    if (proxy := next((x for x in leaves if isinstance(x, Proxy)), None)) is not None:
        proxy.tracer.create_proxy("call_function", check, (inputs, kinds, guards), {})
        return
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
