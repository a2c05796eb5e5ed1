"""Candidates: a normalisation, the contraction that it feeds, and the slice of the graph that may belong to them. Where there
is no normalisation, a contraction that feeds another one is in its place.

A slice reaches back from the contraction through everything that can be read per element, and stops at what makes
activations (linear, convolution, normalisation, …). Operands of a contraction are followed through views only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import Graph, Node

from fuse.passes.read.flex import IN_BASE_2, is_flex
from fuse.passes.read.graph import VIEWS, Calls, State, operator_name, reached_from, storage_of, tensor_of, writes
from fuse.passes.read.layers import weights_of_layers
from fuse.passes.read.varlen import VARLEN, VARLEN_LSE, is_varlen
from fuse.torch_private import HigherOrderOperator

# Names bound what is searched, and so the cost of searching; whether it is attention is read, by ``lift``. An unknown name is
# followed like any other, and what is no attention is found to be none.
NORMALISATIONS = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax", "special_log_softmax", "softmin",
    "exp", "exp_",
}  # fmt: skip
# An exponential may also be no more than a function of the score, or a part of its mask.
FUNCTIONS = {"exp", "exp_"}
ATTENTION = "scaled_dot_product_attention"
MATRIX_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
CONTRACTIONS = MATRIX_PRODUCTS | {"mm", "sum", "tensordot", "mv", "matvec", "inner"}
PRODUCERS = {
    "linear", "embedding_bag", "layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm",
    "native_layer_norm", "lstm", "gru", "rnn_tanh", "interpolate", "grid_sample", "bilinear", "cdist", "addmm",
    "multi_head_attention_forward", "_transformer_encoder_layer_fwd", ATTENTION, VARLEN, "fft", "rfft", "item", "tolist",
    "glu", "gelu", "silu", "pad_sequence", "index_copy_", "index_copy",
}  # fmt: skip
# What goes from one level of torch.func to another.
_LEVELS = (
    "_vmap",
    "_add_batch",
    "_remove_batch",
    "_functorch",
    "_wrap_for",
    "_unwrap_for",
    "_set_tensor",
    "_make_dual",
    "_autograd",
)
# Which results of operators of attention are statistics of rows
_FLEX_ROWS: Mapping[int, tuple[Literal["lse", "max"], Calls]] = {1: ("lse", IN_BASE_2), 2: ("max", IN_BASE_2)}
_VARLEN_ROWS: Mapping[int, tuple[Literal["lse", "max"], Calls]] = {1: ("lse", VARLEN_LSE)}
_SUMS = {"add", "iadd", "add_", "__add__"}
# Of what a log-sum-exp, or a mean of weights, is made beside what the result needs.
_STATISTICS = {
    "logsumexp", "log", "add", "amax", "max", "getitem", "squeeze", "unsqueeze", "mean", "view", "reshape", "unflatten", "sum",
    "exp", "sub", "detach", "to", "float",
}  # fmt: skip
_FORWARD_LIMIT = 64  # nodes between a normalisation and its contraction
_SLICE_LIMIT = 600  # nodes of one slice


@dataclass(frozen=True)
class RowStatistic:
    """A node that holds the log-sum-exp or the maximum of rows as an operator gives it, and the calls, operators and what they
    are given beside the tensor, that make it of that of the scores in the root's dimensions."""

    node: Node
    kind: Literal["lse", "max"]
    calls: Calls


@dataclass(frozen=True)
class Candidate:
    """
    anchor      the normalisation, a call of attention as a whole, or the first of two contractions without either
    roots       nodes whose value may be the attention's result, most likely first
    rows        beside a root: what of it somebody reads
    sums        where the last root adds up products behind one anchor: these
    statistics  nodes that no root needs, but that may be such, or weights
    softmax     whether there is a normalisation; of one root there may be two candidates, with and without
    """

    anchor: Node
    roots: tuple[Node, ...]
    nodes: frozenset[Node]
    inputs: frozenset[Node]
    rows: tuple[RowStatistic, ...] = ()
    sums: frozenset[Node] = frozenset()
    statistics: frozenset[Node] = frozenset()
    softmax: bool = True


def find(graph: Graph, states: Mapping[Node, State]) -> list[Candidate]:
    """All candidates of a graph, in order."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    mutations = _mutations(graph)
    found: dict[Node, Candidate] = {}
    reached: dict[Node, tuple[Node, set[Node]]] = {}
    for node in graph.nodes:
        if _gives_several(node):
            found |= {c.roots[0]: c for c in _of_results(node, states, mutations, order)}
        if node.op not in ("call_function", "call_method") or tensor_of(node) is None:
            continue
        name = operator_name(node)
        if name == ATTENTION:
            found[node] = _slice(node, (node,), {node}, states, mutations, order)
        elif name in NORMALISATIONS:
            for contraction, passed in _contractions_after(node, order):
                # The nearest normalisation counts; one further up, such as a router's, may also end here
                reached[contraction] = (node, passed | reached.get(contraction, (node, set()))[1])
    for contraction, (anchor, passed) in reached.items():
        total, products = _sum_after(contraction, {c for c, (n, _) in reached.items() if n is anchor})
        first = total is not None and contraction is min(products, key=order.__getitem__)
        roots = (contraction, *((total,) if total is not None and first else _divisions_after(contraction)))
        made = _with_statistics(_slice(anchor, roots, passed, states, mutations, order))
        found[contraction] = replace(made, sums=products) if first else made
    settled = {c.roots[0] for c in found.values() if operator_name(c.anchor) not in FUNCTIONS}
    # Products that make the scores of others are none of their own: rotary positions are a product before them.
    settled |= {n for c in found.values() for n in c.nodes if n not in c.roots}
    chains = [
        replace(_slice(first, (second, *_divisions_after(second)), passed, states, mutations, order), softmax=False)
        for second, (first, passed) in _chained(graph, order).items() if second not in settled
    ]  # fmt: skip
    return sorted([*found.values(), *chains], key=lambda c: order[c.roots[0]])


def is_attention(node: Node) -> bool:
    """Is this attention in one call, whose products ``trace`` writes out?"""
    return operator_name(node) == ATTENTION or _gives_several(node)


def _gives_several(node: Node) -> bool:
    """Is it an operator of attention that gives the result, the log-sum-exp of the rows and something else?"""
    return is_flex(node) or is_varlen(node)


def _of_results(
    node: Node, states: Mapping[Node, State], mutations: Mapping[int, list[Node]], order: Mapping[Node, int]
) -> list[Candidate]:
    """What reads the result, and the log-sum-exp and the maximum with it."""
    items = {user.args[1]: user for user in node.users if operator_name(user) == "getitem"}
    if 0 not in items:
        return []
    found = _slice(node, (items[0],), {node}, states, mutations, order)
    known = _FLEX_ROWS if is_flex(node) else _VARLEN_ROWS
    read = [i for i in known if i in items and items[i].users and order[items[i]] > order[items[0]]]
    rows = tuple(RowStatistic(items[i], *known[i]) for i in read)
    return [replace(found, nodes=found.nodes.union(of.node for of in rows), rows=rows)]


def _with_statistics(of: Candidate) -> Candidate:
    """With what may be the log-sum-exp of its scores, or a mean of its weights, though the result does not need it."""
    scores = {n for n in of.nodes - {*of.roots} if is_contraction(n)}
    nodes, behind = set(of.nodes), reached_from(*scores) - reached_from(*of.roots)
    while True:
        found = (n for n in behind - nodes if operator_name(n) in _STATISTICS and not writes(n))
        more = {n for n in found if {*n.all_input_nodes} <= nodes | of.inputs}
        if not more:
            return replace(of, nodes=frozenset(nodes), statistics=frozenset(nodes - of.nodes))
        nodes |= more


def is_contraction(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and operator_name(node) in CONTRACTIONS


def _contractions_after(anchor: Node, order: Mapping[Node, int], stops: Set[str] = frozenset()) -> list[tuple[Node, set[Node]]]:
    """The contractions that the anchor's value reaches through other operations but ``stops``, with the nodes it passed."""
    seen, queue, ends = {anchor}, [anchor], []
    while queue and len(seen) < _FORWARD_LIMIT:
        for user in _readers(queue.pop(0), order):
            if user in seen or user.op not in ("call_function", "call_method"):
                continue
            seen.add(user)
            if is_contraction(user) and not _is_row_sum(user):
                ends.append(user)
            elif operator_name(user) not in PRODUCERS | stops:
                queue.append(user)
    return [(end, seen) for end in ends]


def _chained(graph: Graph, order: Mapping[Node, int]) -> dict[Node, tuple[Node, set[Node]]]:
    """Products that another one reaches without a softmax: that one, and the nodes between.

    A product by a layer's weights gives no scores.
    """
    products = [n for n in graph.nodes if is_contraction(n) and operator_name(n) in MATRIX_PRODUCTS]
    weights = weights_of_layers(graph) if len(products) > 1 else set()
    of_activations = [n for n in products if weights.isdisjoint(n.all_input_nodes)]
    return {
        end: (node, passed)
        for node in of_activations
        for end, passed in _contractions_after(node, order, NORMALISATIONS - FUNCTIONS)
        if end in of_activations
    }


def _readers(node: Node, order: Mapping[Node, int]) -> Iterable[Node]:
    """Who reads a node's value: its users, and after a write in place those of the memory's other names."""
    if not writes(node):
        return node.users
    names = [n for n in order if storage_of(n) == storage_of(node)]
    return [u for n in names for u in n.users if order[u] > order[node]]


def _is_row_sum(node: Node) -> bool:
    """The sum over exp, not the sum that ends a product."""
    source = node.args[0] if node.args else None
    return operator_name(node) == "sum" and isinstance(source, Node) and operator_name(source) not in ("mul", "multiply")


def _divisions_after(contraction: Node) -> tuple[Node, ...]:
    """Deferred normalisation: (exp(s) @ v) / sum."""
    return tuple(u for u in contraction.users if operator_name(u) in ("div", "truediv", "mul", "div_", "mul_", "itruediv"))


def _sum_after(contraction: Node, alike: set[Node]) -> tuple[Node | None, frozenset[Node]]:
    """The node that adds up products of ``alike`` alone, this one among them, and these."""
    total, products, node = None, frozenset[Node](), contraction
    while len(node.users) == 1:
        (node,) = node.users
        if operator_name(node) in _SUMS and len(terms := _terms(node)) > 1 and terms <= alike:
            total, products = node, terms
        elif not _is_view(node):
            break
    return total, products


def _terms(node: Node) -> frozenset[Node]:
    """What a sum is a sum of, behind views."""
    if operator_name(node) in _SUMS:
        return frozenset().union(*map(_terms, node.all_input_nodes))
    return _terms(node.all_input_nodes[0]) if _is_view(node) else frozenset((node,))


def _mutations(graph: Graph) -> dict[int, list[Node]]:
    """Storage → the nodes that write it."""
    found: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for written in writes(node):
            storage = storage_of(written)
            if storage is not None:
                found.setdefault(storage, []).append(node)
    return found


def _slice(
    anchor: Node,
    roots: tuple[Node, ...],
    passed: set[Node],
    states: Mapping[Node, State],
    mutations: Mapping[int, list[Node]],
    order: Mapping[Node, int],
) -> Candidate:
    nodes: set[Node] = set()
    inputs: set[Node] = set()
    visited: set[tuple[Node, bool]] = set()
    stack = [(root, False) for root in roots]
    last = max(order[r] for r in roots)
    while stack:
        node, views_only = stack.pop()
        if (node, views_only) in visited:
            continue
        visited.add((node, views_only))
        whole = node is anchor and is_attention(node)
        stop = node not in roots and not whole and (_is_input(node, states, states[roots[0]]) or len(nodes) > _SLICE_LIMIT)
        if stop or (views_only and not _is_view(node)):
            inputs.add(node)
            continue
        nodes.add(node)
        contraction = is_contraction(node) and not _is_elementwise_sum(node)
        for arg in node.all_input_nodes:
            only = views_only or ((contraction or whole) and arg not in passed)
            stack.append((arg, only and not _is_mask_argument(node, arg)))
        for writer in _writers(node, mutations, order, last):
            stack.append((writer, False))
    return Candidate(anchor, roots, frozenset(nodes), frozenset(inputs - nodes))


def _is_elementwise_sum(node: Node) -> bool:
    return operator_name(node) == "sum"


def _is_mask_argument(node: Node, arg: Node) -> bool:
    """Masks, biases and the addend of baddbmm are part of the scores, not of a product."""
    name = operator_name(node)
    if _gives_several(node):
        return arg not in node.args[:3]
    if name == ATTENTION:
        return node.kwargs.get("attn_mask") is arg or (len(node.args) > 3 and node.args[3] is arg)
    return name == "baddbmm" and node.args[0] is arg


def _writers(node: Node, mutations: Mapping[int, list[Node]], order: Mapping[Node, int], last: int) -> Iterable[Node]:
    storage = storage_of(node)
    return [] if storage is None else [w for w in mutations.get(storage, []) if order[w] <= last]


def _within(inner: State, around: State) -> bool:
    """Whether a value can be read where ``around`` holds without leaving a transform that it was made under."""
    return inner.transforms == around.transforms[: len(inner.transforms)]


def _is_input(node: Node, states: Mapping[Node, State], around: State) -> bool:
    if node.op not in ("call_function", "call_method") or not _within(states[node], around):
        return True
    if isinstance(node.target, HigherOrderOperator) or operator_name(node) in PRODUCERS:
        return True
    name = operator_name(node)
    if name == "embedding" and (node.kwargs.get("max_norm") or len(node.args) > 3 and node.args[3]):
        return True  # it scales the table in place
    if name.startswith(("conv", *_LEVELS)):
        return True
    value = node.meta.get("example_value")
    if value is None:
        return not writes(node)
    if not isinstance(value, (torch.Tensor, tuple, list)) or isinstance(value, torch.Size):
        return True
    source = node.args[0] if node.args else None
    return name == "getitem" and isinstance(source, Node) and not _tensors(source) and _is_input(source, states, around)


def _tensors(node: Node) -> bool:
    return tensor_of(node) is not None


def _is_view(node: Node) -> bool:
    if operator_name(node) not in VIEWS:
        return False
    if operator_name(node) == "getitem":  # indexing by tensors is a gather
        return len(node.all_input_nodes) == 1 or all(not _tensors(a) for a in node.all_input_nodes[1:])
    return True
