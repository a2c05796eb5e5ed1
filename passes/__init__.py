"""The passes, in order. Each reads what the one before found; the graph changes in the last two only.

of a graph
    states    what surrounds each node: autocast, grad mode, functorch level
    find      candidates: a normalisation, the contraction behind it, the slice of the graph around them
    trace     the slices as functional ATen, for reading
of each site
    lift      one element of the result as mathematics: an AttentionSpec, or a reason why not
    PASSES    from one spec to the next, verified after each
    insert    the op before the site's root, reading what the spec reads
of the graph
    accept    one fuse::attention in the place of each root whose scores nothing else needs; what nothing uses is removed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import fuse.ops.attention
import fuse.ops.snapshot
import fuse.ops.tile_map  # noqa: F401  they register their ops
from fuse.ir.spec import InvalidSpec, verify
from fuse.passes.accept import Found, accept, declined_site
from fuse.passes.expand import expand
from fuse.passes.find import Candidate, find, is_attention
from fuse.passes.layout import put_keys_innermost
from fuse.passes.lift import Lifted, Pass, SiteContext, lift
from fuse.passes.masks import recover_mask
from fuse.passes.read.graph import State, hidden_subclass, operator_name, states
from fuse.passes.read.trace import Trace, trace
from fuse.passes.replace import insert, remove
from fuse.passes.tables import tabulate
from fuse.passes.tiles import map_tiles
from fuse.passes.transforms import check_transforms
from fuse.report.reasons import Declined, InternalError, NoScoreProduct, NotSoftmax, Subclass
from fuse.report.site import Site

PASSES: tuple[Pass, ...] = (
    recover_mask,  # the predicate is separated from the score and bounded in closed form
    tabulate,  # functions of the distance between query and key are computed once for each distance
    put_keys_innermost,  # biases that lie across the keys are copied once
    map_tiles,  # what an opaque mask lets be seen of each tile is computed once in the graph
)

# Higher-order operations whose bodies are ordinary code that runs as written.
_BODIES = ("checkpoint", "invoke_subgraph", "wrap", "cond")


def run(gm: GraphModule, target: str, inputs: Sequence[Any] = ()) -> list[Site]:
    """Rewrites ``gm`` and the bodies inside it; one Site for every attention that was found, fused or not. Never raises.

    ``inputs`` are the graph's, if they are known: their types may say more than the graph does.
    """
    sites: list[Site] = []
    hidden = hidden_subclass(gm.graph, inputs)
    for graph in _graphs(gm):
        try:
            sites += _run_graph(graph, target, Declined(Subclass(hidden)) if hidden else None)
        except Exception as e:  # a defect of a pass must not cost the user the model
            sites.append(Site(False, InternalError(f"{type(e).__name__}: {e}"), "", ""))
    for module in gm.modules():
        if isinstance(module, GraphModule):
            module.recompile()
    return sites


def _graphs(gm: GraphModule) -> Iterator[Graph]:
    yield gm.graph
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and any(b in operator_name(node) for b in _BODIES):
            for arg in node.all_input_nodes:
                body = getattr(gm, str(arg.target), None) if arg.op == "get_attr" else None
                if isinstance(body, GraphModule):
                    yield from _graphs(body)


def _run_graph(graph: Graph, target: str, refused: Declined | None) -> list[Site]:
    """The passes on one graph; a composite call in which nothing is fused stays as it was."""
    expansions = expand(graph)
    before = set(graph.nodes)
    sites = _fuse_sites(graph, target, refused, {n for e in expansions for n in (e.call, *(old for old, _ in e.moved))})
    made = {n for n in graph.nodes if n not in before}
    left = set(graph.nodes)
    for e in expansions:
        if all(n in left for n in e.nodes) and not any(u in made for n in e.nodes for u in n.users):
            e.undo(graph)
        else:
            remove(graph, [n for n, _ in e.moved if n in left and not n.users and n is not e.call] + [e.call])
    return sites


def _fuse_sites(graph: Graph, target: str, refused: Declined | None, kept: set[Node]) -> list[Site]:
    """Fuses what can be, if the graph is not ``refused``; of the nodes that nobody reads any more, ``kept`` stay."""
    state_of = states(graph)
    candidates = find(graph, state_of)
    if not candidates:
        return []
    sites: list[Site] = []
    found: list[Found] = []
    for candidate, traced in _traces(graph, candidates, state_of) if refused is None else ((c, refused) for c in candidates):
        try:
            if isinstance(traced, Declined):
                raise traced
            found.append(_fuse_site(graph, candidate, SiteContext(traced, target), state_of))
        except Declined as d:
            if is_attention(candidate.anchor) or not isinstance(d.reason, (NotSoftmax, NoScoreProduct)):
                sites.append(declined_site(candidate, d.reason))
        except Exception as e:
            sites.append(declined_site(candidate, InternalError(f"{type(e).__name__}: {e}")))
    return sites + accept(graph, candidates, found, kept)


def _traces(
    graph: Graph, candidates: list[Candidate], state_of: Mapping[Node, State]
) -> Iterator[tuple[Candidate, Trace | Declined]]:
    """One trace for all slices, so that a mask built once is read once; one each where that fails."""
    together = _trace_slices(graph, candidates, state_of)
    for c in candidates:
        yield c, together if isinstance(together, Trace) else _trace_slices(graph, [c], state_of)


def _trace_slices(graph: Graph, candidates: list[Candidate], state_of: Mapping[Node, State]) -> Trace | Declined:
    nodes = frozenset().union(*(c.nodes for c in candidates))
    inputs = frozenset().union(*(c.inputs for c in candidates)) - nodes
    try:
        return trace([n for n in graph.nodes if n in nodes], [n for n in graph.nodes if n in inputs], state_of)
    except Declined as d:
        return d


def _fuse_site(graph: Graph, candidate: Candidate, context: SiteContext, state_of: Mapping[Node, State]) -> Found:
    """The site at the outermost of the candidate's roots that can be read."""
    declined: Declined | None = None
    for root in reversed(candidate.roots):
        try:
            lifted = lift(root, context.trace)
        except Declined as d:
            declined = declined or d
            continue
        check_transforms(lifted, candidate.inputs, state_of[candidate.anchor], state_of[root])
        steps = [("lift", lifted.spec)]
        for each in PASSES:
            lifted = _verified(each, each(lifted, context))
            steps.append((each.__name__, lifted.spec))
        replacement = insert(graph, root, candidate.lse, lifted, context, state_of[root].transforms)
        return Found(candidate, lifted, replacement, (*steps, ("insert", replacement.spec)))
    assert declined is not None
    raise declined


def _verified(by: Pass, lifted: Lifted) -> Lifted:
    try:
        verify(lifted.spec)
    except InvalidSpec as e:
        raise InvalidSpec(f"after {by.__name__}: {e}") from None
    return lifted
