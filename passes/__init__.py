"""The passes, in order. Each reads what the one before found; the graph changes in the last step only.

states      what surrounds each node: autocast, grad mode, functorch level
find        candidates: a normalisation, the contraction behind it, the slice of the graph around them
trace       the slices as functional ATen, for reading
lift        one element of the result as mathematics: an AttentionSpec, or a reason why not
masks       the predicate is separated from the score and bounded in closed form
tables      functions of the distance between query and key are computed once for each distance
layout      the order of the result in memory, from its consumer
tiles       what an opaque mask lets be seen of each tile, computed once in the graph
replace     one fuse::attention in the place of each root; what nothing uses any more is removed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

import fuse.ops.attention
import fuse.ops.tile_map  # noqa: F401  both register their ops
from fuse.options import Options
from fuse.passes.expand import expand
from fuse.passes.find import Candidate, find
from fuse.passes.layout import keys_innermost
from fuse.passes.lift import Lifted, lift
from fuse.passes.masks import recover_mask
from fuse.passes.read.graph import State, location, module_path, operator_name, states, user_name
from fuse.passes.read.trace import Seed, Trace, size_hint, trace
from fuse.passes.replace import Replacement, insert, live_nodes, remove, unread_nodes
from fuse.passes.tables import tabulated
from fuse.passes.tiles import with_tile_map
from fuse.report.reasons import (  # fmt: skip
    Declined,
    InternalError,
    NoScoreProduct,
    NotSoftmax,
    ProbabilitiesUsed,
    Reason,
    StateChanges,
)
from fuse.report.site import Site
from fuse.report.wording import mask_text, score_text

# Higher-order operations whose bodies are ordinary code that runs as written.
_BODIES = ("checkpoint", "invoke_subgraph", "wrap", "cond")


@dataclass(frozen=True)
class _Found:
    candidate: Candidate
    lifted: Lifted
    replacement: Replacement

    @property
    def consumed(self) -> set[Node]:
        """The nodes that nothing else may need: the scores, and what draws random numbers, which are now others."""
        drawn = {leaf.origin for leaf in self.lifted.leaves if isinstance(leaf, Seed)}
        return {n for n in {self.lifted.scores.origin, *drawn} if n is not None and n is not self.replacement.root}


def run(gm: GraphModule, options: Options) -> list[Site]:
    """Rewrites ``gm`` and the bodies inside it; one Site for every attention that was found, fused or not. Never raises."""
    sites: list[Site] = []
    for graph in _graphs(gm):
        try:
            sites += _run_graph(graph, options.target)
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


def _run_graph(graph: Graph, target: str) -> list[Site]:
    """The passes on one graph; a composite call in which nothing is fused stays as it was."""
    expansions = expand(graph)
    before = set(graph.nodes)
    sites = _fuse_sites(graph, target, {n for e in expansions for n in (e.call, *(old for old, _ in e.moved))})
    made = {n for n in graph.nodes if n not in before}
    left = set(graph.nodes)
    for e in expansions:
        if all(n in left for n in e.nodes) and not any(u in made for n in e.nodes for u in n.users):
            e.undo(graph)
        else:
            remove(graph, [n for n, _ in e.moved if n in left and not n.users and n is not e.call] + [e.call])
    return sites


def _fuse_sites(graph: Graph, target: str, kept: set[Node]) -> list[Site]:
    """Fuses what can be; of the nodes that nobody reads any more, ``kept`` stay."""
    state_of = states(graph)
    candidates = find(graph, state_of)
    if not candidates:
        return []
    sites: list[Site] = []
    found: list[_Found] = []
    for candidate, traced in _traces(graph, candidates, state_of):
        try:
            if isinstance(traced, Declined):
                raise traced
            found.append(_lift_candidate(graph, candidate, traced, state_of, target))
        except Declined as d:
            if not isinstance(d.reason, (NotSoftmax, NoScoreProduct)):
                sites.append(_declined(candidate, d.reason))
        except Exception as e:
            sites.append(_declined(candidate, InternalError(f"{type(e).__name__}: {e}")))
    return sites + _apply(graph, candidates, found, kept)


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


def _lift_candidate(
    graph: Graph,
    candidate: Candidate,
    traced: Trace,
    state_of: Mapping[Node, State],
    target: str,
) -> _Found:
    declined: Declined | None = None
    for root in reversed(candidate.roots):
        try:
            lifted = lift(root, traced)
        except Declined as d:
            declined = declined or d
            continue
        _check_state(candidate, root, state_of)
        lifted = keys_innermost(tabulated(dataclasses.replace(lifted, spec=recover_mask(lifted.spec))))
        lifted = with_tile_map(lifted, traced, target)
        return _Found(candidate, lifted, insert(graph, root, lifted, traced, target))
    assert declined is not None
    raise declined


def _check_state(candidate: Candidate, root: Node, state_of: Mapping[Node, State]) -> None:
    if state_of[candidate.anchor].level != state_of[root].level:
        raise Declined(StateChanges("the border of a functorch transform"))


def _apply(graph: Graph, candidates: list[Candidate], found: list[_Found], kept_nodes: set[Node]) -> list[Site]:
    """Accepts the sites whose scores nothing else needs; takes the others back."""
    emitted = {n for f in found for n in f.replacement.made}
    slices = set().union(*(c.nodes for c in candidates))
    slices |= (unread_nodes(graph, slices) - kept_nodes) | emitted
    accepted = list(found)
    while True:
        replaced = {f.replacement.root: f.replacement.result for f in accepted}
        live = live_nodes(graph, slices, replaced)
        kept = [f for f in accepted if live.isdisjoint(f.consumed)]
        if len(kept) == len(accepted):
            break
        accepted = kept
    sites = []
    for f in found:
        if f in accepted:
            f.replacement.root.replace_all_uses_with(f.replacement.result)
            sites.append(_fused(f))
        else:
            sites.append(_declined(f.candidate, ProbabilitiesUsed(_user_of(f, live, slices))))
    remove(graph, [n for n in graph.nodes if n in slices and n not in live])
    graph.lint()
    return sites


def _user_of(found: _Found, live: set[Node], slices: set[Node]) -> str:
    """What else reads the scores or what was made of them: the first such node outside of the slices."""
    seen: set[Node] = set()
    queue = list(found.consumed)
    while queue:
        node = queue.pop(0)
        if node in live and node not in slices:
            return "the graph's output" if node.op == "output" else node.name
        queue += [u for u in node.users if u not in seen and u is not found.replacement.root]
        seen.update(node.users)
    return "another computation"


def _fused(f: _Found) -> Site:
    spec, root = f.replacement.spec, f.replacement.root
    names = {i: user_name(n) for i, n in enumerate(f.replacement.leaves)}
    mask = mask_text(spec.mask.predicate, names) if spec.mask else ""
    sizes = tuple(size_hint(n, f.lifted.leaves[0]) for n in f.lifted.sizes)
    formula, wanted = score_text(spec.score, names), f.replacement.wanted
    return Site(True, None, location(root), module_path(root), formula, mask, spec, sizes, names, wanted=wanted)


def _declined(candidate: Candidate, reason: Reason) -> Site:
    root = candidate.roots[0]
    return Site(False, reason, location(root), module_path(root))
