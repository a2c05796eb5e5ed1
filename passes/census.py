"""What the sites of a graph leave unsaid: attention that stands in none of them, and normalisations that are no attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

from torch.fx import Graph, Node

from fuse.passes.expand import COMPOSITES
from fuse.passes.find import ATTENTION, FUNCTIONS, NORMALISATIONS
from fuse.passes.read.bodies import graphs_of, is_ordinary
from fuse.passes.read.graph import frames, location, module_path, operator_name
from fuse.report.reasons import Reason, UnreadBody, UnreadOperator
from fuse.report.site import Other, Site
from fuse.torch_private import HigherOrderOperator, OpOverload

LOOKED_FOR = (
    "softmax, exp or a product before a product, scaled_dot_product_attention, nn.MultiheadAttention, operators named attention"
)
_NAMED = ("attention", "attn")
_CALLS = ("call_function", "call_method", "call_module")
_SOFTMAXES = NORMALISATIONS - FUNCTIONS


def unread(graph: Graph, told: Set[Node]) -> list[Site]:
    """Attention that no pass looks into, beside the nodes that sites tell of."""
    found = []
    for node in graph.nodes:
        if node in told or node.op not in _CALLS:
            continue
        if _is_attention(node):
            found.append(_declined(node, UnreadOperator(_called(node))))
        elif isinstance(node.target, HigherOrderOperator) and not is_ordinary(node):
            found += [_declined(n, UnreadBody(operator_name(node)), node) for n in _inside(node)]
    return found


def others(graph: Graph, told: Set[Node], lacking: Mapping[Node, Reason]) -> list[Other]:
    """Normalisations that no site tells of; ``lacking``: what those that a product follows lack to be an attention's."""
    found = []
    for node in graph.nodes:
        if node in told:
            continue
        if node in lacking:
            found.append(_other(node, str(lacking[node])))
        elif _is_normalisation(node):
            found.append(_other(node, "no product of its own follows"))
    return found


def _is_attention(node: Node) -> bool:
    name = _called(node)
    ours = isinstance(node.target, OpOverload) and node.target.namespace == "fuse"
    return not ours and (any(part in name.lower() for part in _NAMED) or name in COMPOSITES)


def _called(node: Node) -> str:
    """The name of an operator, or of the class of a module that the graph calls as one."""
    if node.op != "call_module":
        return operator_name(node)
    module = node.graph.owning_module
    return "" if module is None else type(module.get_submodule(str(node.target))).__name__


def _is_normalisation(node: Node) -> bool:
    """An exponential is one if the sum of it is taken."""
    if node.op == "call_module":
        return "softm" in _called(node).lower()
    if node.op not in _CALLS:
        return False
    name = operator_name(node)
    return name in _SOFTMAXES or (name in NORMALISATIONS and any(operator_name(user) == "sum" for user in node.users))


def _inside(node: Node) -> Iterator[Node]:
    for graph in graphs_of(node):
        for n in graph.nodes:
            if n.op in _CALLS and (operator_name(n) == ATTENTION or _is_normalisation(n) or _is_attention(n)):
                yield n
            yield from _inside(n)


def _declined(node: Node, reason: Reason, caller: Node | None = None) -> Site:
    where, called = location(node) or location(caller or node), frames(node) or frames(caller or node)
    return Site(False, reason, where, module_path(caller or node), frames=called)


def _other(node: Node, why: str) -> Other:
    return Other(_called(node), location(node), module_path(node), why)
