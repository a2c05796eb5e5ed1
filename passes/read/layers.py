"""Which values of a graph are a layer's weights: a product with them is the layer, not one of queries and keys."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fuse.passes.read.graph import NAME, is_of_module, operator_name, tensor_of

# What places are looked up in it is no weight any more: each text has others.
_TOKENS = {"embedding", "embedding_bag"}


def weights_of_layers(graph: Graph) -> set[Node]:
    """Parameters and buffers, and what is computed of such alone: views, casts, scaled ones, those of chosen experts."""
    found: set[Node] = set()
    for node in graph.nodes:
        if tensor_of(node) is None:
            continue
        if node.op in ("placeholder", "get_attr"):
            found.update([node] if _is_held(node) else [])
        elif operator_name(node) not in _TOKENS:
            numbers = [n for n in node.all_input_nodes if n in found or _is_float(n)]
            found.update([node] if numbers and found.issuperset(numbers) else [])
    return found


def _is_held(node: Node) -> bool:
    """By the model, rather than given to it. A program's inputs that it holds have names in it."""
    return (
        node.op == "get_attr"
        or isinstance(tensor_of(node), torch.nn.Parameter)
        or bool(node.meta.get(NAME))
        or is_of_module(node)
    )


def _is_float(node: Node) -> bool:
    """Others are places that are chosen."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.is_floating_point()
