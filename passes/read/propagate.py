"""What each node of a graph holds, for graphs that Dynamo did not make.

Dynamo leaves an ``example_value`` at each node: fake tensors of one mode, which share memory where the values do, and want a
gradient where they do. Other tracers leave less: ``val``, detached, or after loading of separate memory, or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fuse.passes.read.bodies import Body, bodies
from fuse.passes.read.graph import VALUE, State, operator_name, states
from fuse.torch_private import FakeTensor, FakeTensorMode, pytree, rebind_unbacked


def propagate(gm: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, begins: State) -> None:
    """Gives every node of ``gm``, and of the bodies inside it, its value in a run on ``inputs``: fake tensors of ``mode``.

    A number wants a gradient if it is computed under grad mode of one that does, the first of which are inputs and parameters.
    """
    owners = {m.graph: m for m in gm.modules() if isinstance(m, GraphModule)}
    for body in bodies(gm, begins):
        given = inputs if body.graph is gm.graph else [n.meta.get(VALUE) for n in body.given]
        if body.graph is gm.graph or body.given:
            fresh = nullcontext() if mode.shape_env is None else mode.shape_env.ignore_fresh_unbacked_symbols()
            with mode, torch.no_grad(), fresh:
                _Propagator(owners[body.graph], mode, body).run(*given, enable_io_processing=False)


def forget(gm: GraphModule) -> None:
    """Takes the values back."""
    for node in _nodes(gm):
        node.meta.pop(VALUE, None)


def settle(gm: GraphModule, mode: FakeTensorMode) -> None:
    """Gives the nodes that passes have made a ``val``, as torch.export has it, and takes the values back."""
    for node in _nodes(gm):
        value = node.meta.get(VALUE)
        if "val" not in node.meta and node.op == "call_function":
            with mode, torch.no_grad():
                node.meta["val"] = _called(node) if value is None else value
    forget(gm)


def _nodes(gm: GraphModule) -> list[Node]:
    return [n for m in gm.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]


def _called(node: Node) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return node.target(*args, **kwargs)  # type: ignore[operator]


class _Propagator(Interpreter):
    def __init__(self, gm: GraphModule, mode: FakeTensorMode, body: Body) -> None:
        super().__init__(gm)
        self._mode = mode
        self._states: Mapping[Node, State] = states(body.graph, body.begins)

    def fetch_attr(self, target: str) -> Any:
        """Converted once, so that what shares memory still does."""
        found = super().fetch_attr(target)
        return self._mode.from_tensor(found, static_shapes=True) if isinstance(found, Tensor) else found

    def run_node(self, n: Node) -> Any:
        result: Any = None if operator_name(n) == "_set_grad_enabled" else super().run_node(n)
        if n.meta.get("unbacked_bindings"):
            rebind_unbacked(self._mode.shape_env, n, result)
        if n.op != "output":
            n.meta[VALUE] = pytree.tree_map_only(FakeTensor, lambda x: x.requires_grad_(self._wants(n, x)), result)
        return result

    def _wants(self, node: Node, x: FakeTensor) -> bool:
        """``x`` is a value of ``node``, which runs without autograd: views could not be written in place else."""
        if node.op in ("placeholder", "get_attr"):
            return x.requires_grad
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        own = module is not None and any(p.requires_grad for p in module.parameters())
        flows = (own or any(map(_flows, node.all_input_nodes))) and "detach" not in str(node.target)
        return flows and self._states[node].grad and x.is_floating_point()


def _flows(node: Node) -> bool:
    return bool(pytree.tree_any(lambda x: isinstance(x, Tensor) and x.requires_grad, node.meta.get(VALUE)))
