"""The passes, in order. Each reads what the one before found; the graph changes in the last two only.

of a graph
    expand    composite calls, written out
    states    what surrounds each node: autocast, grad mode, functorch level
    find      candidates: a normalisation or a first product, the contraction behind it, the slice of the graph around them
    trace     the slices as functional ATen, for reading
of each site
    lift      one element of the result as mathematics: an AttentionSpec, or a reason why not
    PASSES    from one spec to the next, verified after each
    beside    what somebody reads of it that is not its result
    insert    the op before the site's root, reading what the spec reads
of the graph
    accept    one fuse::attention in the place of each root whose scores nothing else needs; what nothing uses is removed
    census    what no site tells of
of a sequence over several ranks
    positions what is not computed for each position by itself
    compare   the first attention, where ranks ask whether they make the same call
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch.fx import Graph, GraphModule, Node

import fuse.ops.attention
import fuse.ops.snapshot
import fuse.ops.tile_map
import fuse.ops.weights
import fuse.parallel.op  # noqa: F401  they register their ops
from fuse.ir.spec import AttentionSpec, InvalidSpec, verify
from fuse.parallel.plan import Across
from fuse.passes import census
from fuse.passes.accept import Found, accept, declined_site
from fuse.passes.beside import Beside, read_beside
from fuse.passes.compare import compare_first
from fuse.passes.contents import know_contents
from fuse.passes.distributed import check_distributed
from fuse.passes.expand import Expansion, expand
from fuse.passes.find import Candidate, find, is_attention
from fuse.passes.layout import put_keys_innermost
from fuse.passes.lift import Lifted, Pass, SiteContext, lift
from fuse.passes.masks import recover_mask
from fuse.passes.pays import check_pays
from fuse.passes.policy import Choose, Contents, Leave, Policy, leave_none
from fuse.passes.positions import misplaced
from fuse.passes.read.bodies import Body, bodies
from fuse.passes.read.graph import State, hidden_subclass, operator_name, states, tensor_of
from fuse.passes.read.trace import Trace, Value, trace
from fuse.passes.replace import add_up, insert, live_nodes, remove, unread_nodes
from fuse.passes.spread import spread
from fuse.passes.tables import tabulate
from fuse.passes.terms import terms_of
from fuse.passes.tiles import map_tiles
from fuse.passes.transforms import check_transforms
from fuse.report.reasons import (
    Declined,
    InternalError,
    NoScoreProduct,
    NothingSaved,
    NotSoftmax,
    OtherDevice,
    ProbabilitiesUsed,
    Reason,
    SeveralSoftmaxes,
    Slower,
    Subclass,
    UnsupportedShape,
)
from fuse.report.site import Reading, Site
from fuse.torch_private import SizeWouldBeFixed, is_distributed

T = TypeVar("T")
PASSES: tuple[Pass, ...] = (
    know_contents,  # what a buffer holds is a formula
    recover_mask,  # the predicate is separated from the score and bounded in closed form
    tabulate,  # functions of the distance between query and key are computed once for each distance
    put_keys_innermost,  # biases that lie across the keys are copied once
    map_tiles,  # what an opaque mask lets be seen of each tile is computed once in the graph
)

# Of a sequence that lies on several ranks: maps and tables are made of one shard.
ACROSS_RANKS: tuple[Pass, ...] = (
    know_contents,
    spread,  # places in the shard become places in the whole sequence
    recover_mask,
)

# Of DTensors: what the others make or look at would be one rank's part.
DISTRIBUTED: tuple[Pass, ...] = (recover_mask,)

_NO_ATTENTION = (NotSoftmax, NoScoreProduct)


def run(
    gm: GraphModule,
    choose: Choose,
    inputs: Sequence[Any] = (),
    begins: State | None = None,
    inside: bool = True,
    leave: Leave = leave_none,
    contents: Contents = Contents(),  # noqa: B008  it has no state
    across: Across | None = None,
) -> Reading:
    """Rewrites ``gm``; one Site for every attention that was found, fused or not. Never raises.

    choose    who runs what is fused
    inputs    the graph's, if they are known: their types may say more than the graph does
    begins    the state in which ``gm`` will run; None: that of the caller
    inside    with the bodies inside it
    leave     what is left although it could be fused
    contents  what tensors hold
    across    see Policy
    """
    hidden = hidden_subclass(gm.graph, inputs)
    policy = Policy(choose, leave, contents, Declined(Subclass(hidden)) if hidden else None, across)
    readings = [_never_raises(body, policy) for body in bodies(gm, begins) if inside or body.graph is gm.graph]
    if across is not None and not across.trusted and not any(s.reason for r in readings for s in r.sites):
        others = any(r.others for r in readings)
        readings.append(Reading(tuple(misplaced([b for b in bodies(gm, begins) if inside or b.graph is gm.graph], others))))
    for body in bodies(gm, begins) if across is not None else ():
        compare_first(body.graph)
    for module in gm.modules():
        if isinstance(module, GraphModule):
            module.recompile()
    return Reading(tuple(s for r in readings for s in r.sites), tuple(o for r in readings for o in r.others))


def _never_raises(body: Body, policy: Policy) -> Reading:
    try:
        return _run_graph(body, policy)
    except Exception as e:  # a defect of a pass must not cost the user the model
        return Reading((Site(False, InternalError(f"{type(e).__name__}: {e}"), "", ""),))


@dataclass
class _Told:
    """Sites so far, the nodes that they tell of, what normalisations lack that are no attention's, and where those sites stand
    that were left."""

    sites: list[Site] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)
    lacking: dict[Node, Reason] = field(default_factory=dict)
    anchors: list[Node] = field(default_factory=list)

    def tried(self, candidate: Candidate, make: Callable[[], T], made: list[T]) -> Reason | None:
        """Adds what ``make`` gives to ``made``; what it raises is the reason why the candidate is left."""
        try:
            made.append(make())
            return None
        except Declined as d:
            reason = d.reason
        except Exception as e:
            reason = _failure(e)
        self.decline(candidate, reason)
        return reason

    def forget_readers(self, anchors: Sequence[Node]) -> None:
        """Products that are no attention, but read weights that one of these ``anchors`` gives."""
        self.sites = [site for site, anchor in zip(self.sites, self.anchors, strict=True) if anchor not in anchors]

    def decline(self, candidate: Candidate, reason: Reason) -> None:
        if not candidate.softmax:
            self._two_products(candidate, reason)
        elif isinstance(reason, _NO_ATTENTION) and not is_attention(candidate.anchor):
            self.lacking[candidate.anchor] = reason
        else:
            self.nodes.add(candidate.anchor)
            self.sites.append(declined_site(candidate, reason))
            self.anchors.append(candidate.anchor)

    def _two_products(self, candidate: Candidate, reason: Reason) -> None:
        """Of any two products without a softmax little can be said: what was read as attention is told of."""
        if isinstance(reason, (NothingSaved, ProbabilitiesUsed, Slower)):
            self.lacking[candidate.anchor] = reason


def _run_graph(body: Body, policy: Policy) -> Reading:
    """The passes on one graph; a composite call in which nothing is fused stays as it was."""
    graph = body.graph
    expansions = expand(graph)
    before = set(graph.nodes)
    try:
        told = _fuse_sites(body, policy, expansions)
    except Exception:
        for e in expansions:
            e.undo(graph)
        raise
    made = {n for n in graph.nodes if n not in before}
    left = set(graph.nodes)
    for e in expansions:
        if all(n in left for n in e.nodes) and not any(u in made for n in e.nodes for u in n.users):
            e.undo(graph)
            told.nodes.add(e.call)
        else:
            remove(graph, [n for n, _ in e.moved if n in left and not n.users and n is not e.call] + [e.call])
    sites = (*told.sites, *census.unread(graph, told.nodes))
    return Reading(sites, tuple(census.others(graph, told.nodes, told.lacking)))


def _fuse_sites(body: Body, policy: Policy, expansions: Sequence[Expansion]) -> _Told:
    """Fuses what can be; calls that were written out stay."""
    graph, told = body.graph, _Told()
    kept = {n for e in expansions for n in (e.call, *(old for old, _ in e.moved))}
    calls = {n: e.call for e in expansions for n in e.nodes}
    state_of = states(graph, body.begins)
    candidates = find(graph, state_of)
    summed: set[Node] = set()  # products that are parts of sites
    refused = None if policy.refused is None else ((c, policy.refused) for c in candidates)
    read: list[_Read] = []
    settled: set[Node] = set()
    for candidate, traced in refused or _traces(graph, candidates, state_of):
        if candidate.roots[0] not in summed and (candidate.softmax or candidate.roots[0] not in settled):
            reason = told.tried(candidate, partial(_read_site, candidate, traced, policy, state_of), read)
            if not isinstance(reason, (*_NO_ATTENTION, InternalError)):
                settled.add(candidate.roots[0])
            if reason is None and read[-1].root is candidate.roots[-1]:
                summed |= candidate.sums
    live = _live_beside(graph, candidates, read, kept)
    groups: list[list[Found]] = []

    def put(site: _Read) -> list[Found]:
        made = _insert_site(graph, site, state_of, live, {old for g in groups for f in g for old, _ in f.replacement.beside})
        _check_wanted(graph, made, policy.leave, calls.get(site.candidate.anchor, site.candidate.anchor))
        return made

    for site in read:
        told.tried(site.candidate, partial(put, site), groups)
    found = [f for group in groups for f in group]
    told.forget_readers([f.candidate.anchor for f in found if f.replacement.weights])
    for f, decided in accept(graph, candidates, found, kept) if candidates else ():
        if isinstance(decided, Site):
            told.sites.append(decided)
            told.nodes |= {f.candidate.anchor} if f.candidate.softmax else f.candidate.nodes
        else:
            told.decline(f.candidate, decided)
    return told


def _live_beside(graph: Graph, candidates: Sequence[Candidate], read: Sequence[_Read], kept: Set[Node]) -> Set[Node]:
    """What is needed beside the results of the sites that were read."""
    slices = set().union(*(c.nodes for c in candidates))
    slices |= unread_nodes(graph, slices) - kept
    elsewhere = next(iter(graph.nodes))
    return live_nodes(graph, slices, {site.root: elsewhere for site in read})


def _failure(error: Exception) -> Reason:
    if isinstance(error, SizeWouldBeFixed):  # an exported program allows what it has promised, whatever is read of it
        return UnsupportedShape(f"a size would have to be fixed that the program leaves open: {error}")
    return InternalError(f"{type(error).__name__}: {error}")


def _traces(
    graph: Graph, candidates: list[Candidate], state_of: Mapping[Node, State]
) -> Iterator[tuple[Candidate, Trace | Declined]]:
    """One trace for all slices, so that a mask built once is read once; one each where that fails. What has no softmax may be
    no attention, and must not change how others are read."""
    for softmax in (True, False):
        alike = [c for c in candidates if c.softmax == softmax]
        together = _trace_slices(graph, alike, state_of) if alike else None
        for c in alike:
            yield c, together if isinstance(together, Trace) else _trace_slices(graph, [c], state_of)


def _trace_slices(graph: Graph, candidates: list[Candidate], state_of: Mapping[Node, State]) -> Trace | Declined:
    nodes = frozenset().union(*(c.nodes for c in candidates))
    inputs = frozenset().union(*(c.inputs for c in candidates)) - nodes
    roots = {root for c in candidates for root in c.roots}
    try:
        return trace([n for n in graph.nodes if n in nodes], [n for n in graph.nodes if n in inputs], state_of, roots)
    except Declined as d:
        return d


@dataclass(frozen=True)
class _Term:
    """What was read; ``steps``: as of Found."""

    lifted: Lifted
    steps: tuple[tuple[str, AttentionSpec], ...]


@dataclass(frozen=True)
class _Read:
    """A candidate of which a root was read: the sum of ``terms`` and of what is no attention."""

    candidate: Candidate
    root: Node
    terms: tuple[_Term, ...]
    plain: tuple[Value, ...]
    context: SiteContext


def _read_site(candidate: Candidate, traced: Trace | Declined, policy: Policy, state_of: Mapping[Node, State]) -> _Read:
    """The site at the outermost of the candidate's roots that can be read; several where the weights are a sum."""
    if isinstance(traced, Declined):
        raise traced
    context = _context(traced, candidate, policy)
    declined: Declined | None = None
    for root in reversed(candidate.roots):
        try:
            lifted = lift(context.trace.value_of[root], context.trace, candidate.softmax)
        except Declined as d:
            declined = declined or d
            continue
        term = _read_term(candidate, root, lifted, context, state_of)
        return _Read(candidate, root, (term,), (), context)
    assert declined is not None
    if not candidate.softmax:
        raise declined
    return _read_sum(candidate, context, state_of, declined)


def _read_sum(candidate: Candidate, context: SiteContext, state_of: Mapping[Node, State], declined: Declined) -> _Read:
    """A term for each of the weights that is an attention. Raises ``declined``, or what is known better, if none is."""
    root, trace = candidate.roots[0], context.trace
    terms: list[_Term] = []
    plain: list[Value] = []
    for value in terms_of(trace.value_of[root], trace.stops if trace.value_of[root] in trace.flowing else ()):
        try:
            terms.append(_read_term(candidate, root, lift(value, trace), context, state_of))
        except Declined as d:
            plain.append(value)
            declined = d if isinstance(declined.reason, (*_NO_ATTENTION, SeveralSoftmaxes)) else declined
    if not terms:
        raise declined
    return _Read(candidate, root, tuple(terms), tuple(plain), context)


def _read_term(candidate: Candidate, root: Node, lifted: Lifted, context: SiteContext, state_of: Mapping[Node, State]) -> _Term:
    check_pays(lifted, context.plan is not None)
    check_distributed(lifted, context)
    check_transforms(lifted, candidate.inputs, state_of[candidate.anchor], state_of[root])
    steps = [("lift", lifted.spec)]
    for each in _passes(context):
        lifted = _verified(each, each(lifted, context))
        steps.append((each.__name__, lifted.spec))
    return _Term(lifted, tuple(steps))


def _passes(context: SiteContext) -> tuple[Pass, ...]:
    if context.distributed:
        return DISTRIBUTED
    return PASSES if context.plan is None else ACROSS_RANKS


def _insert_site(graph: Graph, site: _Read, state_of: Mapping[Node, State], live: Set[Node], given: Set[Node]) -> list[Found]:
    """``live``: what is needed beside the results of all sites; ``given``: of that, what others give."""
    first, *others = site.terms
    if others or site.plain:
        return _insert_sum(graph, site, state_of)
    beside = read_beside(site.candidate, site.root, first.lifted, site.context, state_of, live, given)
    return [_inserted(graph, site, first, beside, state_of)]


def _insert_sum(graph: Graph, site: _Read, state_of: Mapping[Node, State]) -> list[Found]:
    found: list[Found] = []
    try:
        for term in site.terms:
            found.append(_inserted(graph, site, term, Beside((), (), site.root, ""), state_of))
    except Declined:
        remove(graph, [n for f in found for n in f.replacement.made])
        raise
    added = add_up(graph, [f.replacement for f in found], site.plain, site.terms[0].lifted, site.context)
    return [dataclasses.replace(f, replacement=r) for f, r in zip(found, added, strict=True)]


def _inserted(graph: Graph, site: _Read, term: _Term, beside: Beside, state_of: Mapping[Node, State]) -> Found:
    replacement = insert(graph, site.root, beside, term.lifted, site.context, state_of[site.root].transforms)
    return Found(site.candidate, term.lifted, replacement, (*term.steps, ("insert", replacement.spec)))


def _context(traced: Trace, candidate: Candidate, policy: Policy) -> SiteContext:
    distributed = any(is_distributed(tensor_of(n)) for n in (*candidate.nodes, *candidate.inputs))
    plan = None if policy.across is None else policy.across.plan
    return SiteContext(traced, _target(candidate, policy.choose), policy.contents, plan, distributed)


def _target(candidate: Candidate, choose: Choose) -> str:
    """Who computes the site. Raises Declined where nobody has kernels for its tensors."""
    tensor = next(t for root in candidate.roots if (t := tensor_of(root)) is not None)
    target = choose(tensor.device)
    if target is None:
        raise Declined(OtherDevice(str(tensor.device)))
    return target


def _check_wanted(graph: Graph, sites: Sequence[Found], leave: Leave, call: Node) -> None:
    """Raises Declined, and takes the ops back, where one is to be left as it is. ``call``: see Leave; or no attention."""
    anchor = sites[0].candidate.anchor
    written = anchor if is_attention(anchor) else call if call is not anchor else None
    name = "" if written is None else operator_name(written)
    for reason in [leave(f.replacement.op, f.replacement.wanted, name) for f in sites]:
        if reason is not None:
            remove(graph, {n for f in sites for n in f.replacement.made})
            raise Declined(reason)


def _verified(by: Pass, lifted: Lifted) -> Lifted:
    try:
        verify(lifted.spec)
    except InvalidSpec as e:
        raise InvalidSpec(f"after {by.__name__}: {e}") from None
    return lifted
