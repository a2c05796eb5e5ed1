"""What a rewritten graph takes for granted of its inputs, as a module in it that looks at them in every call.

torch.compile and torch.export check for themselves. A traced module checks nothing, and an attention that was read for some
sizes would be another function for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Proxy

from fuse.errors import OtherInputs
from fuse.torch_private import FakeTensor, Impure, ShapeEnv, pytree


def assume(gm: GraphModule, fakes: Sequence[Any], shapes: ShapeEnv, mode: bool | None) -> None:
    """Has each call of ``gm`` raise OtherInputs where its inputs are not as ``fakes``, one for each placeholder.

    mode  training or evaluation, if ``gm`` may run in that one only
    """
    leaves = pytree.tree_leaves(list(fakes))
    guards = shapes.produce_guards_expression([x for x in leaves if isinstance(x, FakeTensor)], ignore_static=False)
    name = next(n for i in range(len(gm.graph.nodes) + 1) if not hasattr(gm, n := f"assumptions_{i}"))
    setattr(gm, name, Assumptions([_kind(x) for x in leaves], guards or "True", mode).train(gm.training))
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    with gm.graph.inserting_before(first):
        gm.graph.call_module(name, tuple(gm.graph.find_nodes(op="placeholder")))


def _kind(x: Any) -> Any:
    return (x.dtype, str(x.device), x.dim()) if isinstance(x, Tensor) else x


class Assumptions(Impure):
    """
    kinds   of each leaf of the inputs: (dtype, device, number of dimensions), or the value of what is no tensor
    guards  what must hold of the sizes, as torch writes it
    mode    training or evaluation, if it may run in that one only
    """

    def __init__(self, kinds: Sequence[Any], guards: str, mode: bool | None) -> None:
        super().__init__()
        self.kinds, self.guards, self.mode = list(kinds), guards, mode

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *inputs: Any) -> None:
        """Raises OtherInputs; where it is traced into it stays a call."""
        leaves = pytree.tree_leaves(list(inputs))
        if (proxy := next((x for x in leaves if isinstance(x, Proxy)), None)) is not None:
            tracer: Any = proxy.tracer
            tracer.create_proxy("call_module", tracer.path_of_module(self), inputs, {})
            return
        if self.mode not in (None, self.training):
            raise OtherInputs(assumed=f"training={self.mode}", got=f"training={self.training}")
        for kind, got in zip(self.kinds, map(_kind, leaves), strict=True):
            if kind != got:
                raise OtherInputs(assumed=kind, got=got)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        failed = [g for g in self.guards.split(" and ") if not ShapeEnv().evaluate_guards_expression(g, tensors)]
        if failed:
            raise OtherInputs(assumed=failed[0], got=", ".join(str(tuple(x.shape)) for x in tensors))
