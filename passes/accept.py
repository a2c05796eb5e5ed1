"""Puts fuse::attention in the place of every root whose scores nothing else needs, and takes the others back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from fuse.ir.spec import AttentionSpec
from fuse.passes.find import Candidate
from fuse.passes.lift import Lifted
from fuse.passes.read.graph import MADE, frames, location, module_path, operator_name, user_name
from fuse.passes.read.trace import Seed, size_hint
from fuse.passes.replace import Replacement, live_nodes, remove, unread_nodes
from fuse.passes.transforms import for_all_examples
from fuse.report.reasons import ProbabilitiesUsed, Reason
from fuse.report.site import Site
from fuse.report.wording import mask_text, score_text


@dataclass(frozen=True)
class Found:
    """A site whose op is in the graph, unused; ``steps``: its spec after each pass."""

    candidate: Candidate
    lifted: Lifted
    replacement: Replacement
    steps: tuple[tuple[str, AttentionSpec], ...]

    @property
    def consumed(self) -> set[Node]:
        """The nodes that nothing else may need: the scores, and what draws random numbers, which are now others."""
        drawn = {leaf.origin for leaf in self.lifted.leaves if isinstance(leaf, Seed)}
        scores = {value.origin for value in self.lifted.scores}
        return {n for n in scores | drawn if n is not None and n is not self.replacement.root}


def accept(
    graph: Graph, candidates: list[Candidate], found: list[Found], kept: set[Node]
) -> list[tuple[Found, Site | ProbabilitiesUsed]]:
    """Decides for all sites together, so that products that share probabilities are fused, or none of them is.

    Removes what nothing reads any more, but for ``kept``.
    """
    emitted = {n for f in found for n in f.replacement.made}
    slices = set().union(*(c.nodes for c in candidates))
    slices |= (unread_nodes(graph, slices) - kept) | emitted
    accepted = list(found)
    while True:
        replaced = {old: new for f in accepted for old, new in f.replacement.pairs}
        live = live_nodes(graph, slices, replaced)
        kept_back = {f.replacement.root for f in accepted if not live.isdisjoint(f.consumed)}  # a sum is fused in whole
        still = [f for f in accepted if f.replacement.root not in kept_back]
        if len(still) == len(accepted):
            break
        accepted = still
    decided: list[tuple[Found, Site | ProbabilitiesUsed]] = []
    for f in found:
        if f in accepted:
            for old, new in f.replacement.pairs:
                old.replace_all_uses_with(new)
            decided.append((f, _fused_site(f)))
        elif all(s.replacement.root is not f.replacement.root for s in found[: found.index(f)]):
            reader, lacks = _user_of(f, live, slices - f.candidate.statistics), f.replacement.lacks
            decided.append((f, ProbabilitiesUsed(f"{reader}: {lacks}" if lacks else reader)))
    remove(graph, [n for n in graph.nodes if n in slices and n not in live])
    graph.lint()
    return decided


def declined_site(candidate: Candidate, reason: Reason) -> Site:
    root = candidate.roots[0]
    return Site(False, reason, location(root), module_path(root), frames=frames(root))


def _fused_site(f: Found) -> Site:
    spec, root = f.replacement.spec, f.replacement.root
    names = _names(f.replacement.leaves)
    mask = mask_text(spec.mask.predicate, names) if spec.mask else ""
    hints = [size_hint(n, f.lifted.leaves[0]) for n in f.lifted.sizes]
    formula, wanted = score_text(spec.score, names), f.replacement.wanted
    where, module = location(root), module_path(root)
    leaves, around = f.replacement.leaves, f.replacement.around
    weights = tuple(for_all_examples(each, hints, leaves, around)[0] for each in f.replacement.weights)
    spec, sizes = for_all_examples(spec, hints, leaves, around)
    return Site(
        True, None, where, module, formula, mask, spec, sizes, names, wanted=wanted, target=f.replacement.target, steps=f.steps,
        frames=frames(root), relies=tuple(map(user_name, f.lifted.relied)), beside=f.replacement.given, weights=weights,
    )  # fmt: skip


def _names(leaves: Sequence[Node]) -> dict[int, str]:
    """What the user's code calls each; tables that were made of one tensor are told apart by primes."""
    names: dict[int, str] = {}
    for i, node in enumerate(leaves):
        name = user_name(node)
        while MADE in node.meta and name in names.values():
            name += "'"
        names[i] = name
    return names


def _user_of(found: Found, live: set[Node], slices: set[Node]) -> str:
    """What else reads the scores or what was made of them: the first such node outside of the slices."""
    seen: set[Node] = set()
    queue = list(found.consumed)
    while queue:
        node = queue.pop(0)
        if node in live and node not in slices:
            return "the graph's output" if node.op == "output" else f"{operator_name(node)} ({location(node)})"
        queue += [u for u in node.users if u not in seen and u is not found.replacement.root]
        seen.update(node.users)
    return "another computation"
