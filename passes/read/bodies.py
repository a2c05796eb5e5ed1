"""The graphs inside a graph: bodies of higher-order operations, each with the state in which it runs and what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Graph, GraphModule, Node

from fuse.passes.read.graph import Autocast, State, ambient, autocast_dtype, operator_name, states
from fuse.torch_private import HigherOrderOperator, pytree

# Higher-order operations whose bodies are ordinary code that runs as written.
_ORDINARY = ("checkpoint", "invoke_subgraph", "wrap", "cond")


@dataclass(frozen=True)
class Body:
    """``begins``: the state of its first node; ``given``: what its placeholders stand for, () where that is not known."""

    graph: Graph
    begins: State
    given: tuple[Node, ...] = ()


def bodies(gm: GraphModule, begins: State | None = None) -> Iterator[Body]:
    """The graph of ``gm``, which begins in the state of the caller if none is given, and those inside it that are read."""
    waiting, seen = [Body(gm.graph, begins or ambient())], set[Graph]()
    while waiting:
        body = waiting.pop(0)
        if body.graph in seen:
            continue
        seen.add(body.graph)
        state_of = states(body.graph, body.begins)
        for node in filter(is_ordinary, body.graph.nodes):
            waiting += [Body(graph, _inside(node, state_of[node]), _given(node, graph)) for graph in graphs_of(node)]
        yield body


def is_ordinary(node: Node) -> bool:
    """Does it run its bodies as they are written?"""
    higher = isinstance(node.target, HigherOrderOperator)
    return higher and any(name in operator_name(node) for name in _ORDINARY)


def graphs_of(node: Node) -> list[Graph]:
    """The graphs that a call is given."""
    return [module.graph for x in node.all_input_nodes if (module := _module(x)) is not None]


def _module(node: Node) -> GraphModule | None:
    found = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return found if isinstance(found, GraphModule) else None


def _inside(node: Node, state: State) -> State:
    """torch.export makes a body of what runs under another grad mode or autocast."""
    name = operator_name(node)
    if name == "wrap_with_set_grad_enabled":
        return replace(state, grad=bool(node.args[0]))
    if name == "wrap_with_autocast":
        device, dtype, enabled = node.args[:3]
        entered = Autocast(str(device), autocast_dtype(device, dtype), bool(enabled))
        return replace(state, autocast=(*state.autocast, entered))
    return state


def _given(node: Node, graph: Graph) -> tuple[Node, ...]:
    """Operands come last, and every body is given all of them."""
    count = len(graph.find_nodes(op="placeholder"))
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    operands = [x for x in leaves if not isinstance(x, Node) or _module(x) is None]
    found = [x for x in operands[len(operands) - count :] if isinstance(x, Node)]
    return tuple(found) if len(found) == count else ()
