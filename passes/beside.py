"""What somebody reads of a site beside its result: the log-sum-exp of its rows, and its weights.

A node that is computed from the scores, and that something outside of all slices reads, would keep the scores alive. Here it is
read as every element is: if it is the log-sum-exp of the very scores that the site normalises, the op that computes the result
gives it; if it is a matrix of weights, or the mean of some over heads, they are written once by a computation of their own.
Where it is neither, that may be said of what it is made of, and it stays in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import permutations

import sympy
import torch
from torch.fx import Node

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Load, Prob, symbol
from fuse.ir.index import IndexExpr
from fuse.ir.spec import AttentionSpec
from fuse.passes.find import Candidate, RowStatistic
from fuse.passes.layout import memory_order
from fuse.passes.lift import SUPPORTED, Lifted, Read, SiteContext
from fuse.passes.read.elements import dims, op_name
from fuse.passes.read.graph import Calls, State, reached_from, storage_of, writes
from fuse.passes.read.softmax import empty_log_sum_exp, recognise
from fuse.passes.read.trace import Value
from fuse.report.reasons import Declined
from fuse.targets import registry
from fuse.targets.protocols import Writes

aten = torch.ops.aten

OWN = symbol("weight")
_ROWS = {"lse": "the log-sum-exp of its rows", "max": "the maximum of its rows"}
_ROW_AXES = 5  # whose order is tried


@dataclass(frozen=True)
class WeightsOf:
    """A node that holds weights over the batch, queries and keys, in this order, be some dimensions split or of size 1.

    weight  what each is of the probability; OWN: what the product with the values takes
    dtype   the node's
    shape   of the node
    heads   how many neighbouring batch indices it is the mean of; None: it has all of them
    """

    node: Node
    weight: Expr
    dtype: str
    shape: tuple[IndexExpr, ...]
    heads: IndexExpr | None = None


@dataclass(frozen=True)
class Beside:
    """What is given beside a result.

    before  the first node that needs any of it, or the root
    lacks   why weights that somebody reads are not given; "" where there are none such
    """

    rows: tuple[RowStatistic, ...]
    weights: tuple[WeightsOf, ...]
    before: Node
    lacks: str

    @property
    def words(self) -> tuple[str, ...]:
        """What it is, for people, each once."""
        rows = [_ROWS[of.kind] for of in self.rows]
        weights = ["the weights" if w.heads is None else f"the mean of the weights over {w.heads} heads" for w in self.weights]
        return tuple(dict.fromkeys([*rows, *weights]))


def read_beside(
    candidate: Candidate, root: Node, lifted: Lifted, context: SiteContext, states: Mapping[Node, State], live: Set[Node],
    others: Set[Node],
) -> Beside:  # fmt: skip
    """What of the site at ``root`` can be given to who reads it.

    live    the nodes that are needed beside results
    others  what other sites give
    """
    finder = _Finder(candidate, root, lifted, context, states, live, others)
    if lifted.spec.softmax:  # what others divide by has no kernel that gives it
        finder.search()
    order = {n: i for i, n in enumerate(root.graph.nodes)}
    readers = [u for n in finder.given for u in n.users if u in live]
    first = min((root, *readers), key=order.__getitem__)
    return Beside((*candidate.rows, *finder.rows), tuple(finder.weights), first, finder.lacks)


@dataclass
class _Finder:
    candidate: Candidate
    root: Node
    lifted: Lifted
    context: SiteContext
    states: Mapping[Node, State]
    live: Set[Node]
    others: Set[Node]
    rows: list[RowStatistic] = field(default_factory=list)
    weights: list[WeightsOf] = field(default_factory=list)
    given: set[Node] = field(default_factory=set)
    lacks: str = ""

    def search(self) -> None:
        of_scores = self._between()
        pending = [n for n in of_scores if any(u in self.live and u not in of_scores for u in n.users)]
        seen: set[Node] = set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in self.others and not self._give(node):  # it stays, and reads what it is made of
                pending += [n for n in node.all_input_nodes if n in of_scores]

    def _between(self) -> set[Node]:
        """What the slice computes from the scores, but for the result and what is made of that."""
        origins = {value.origin for value in self.lifted.scores}
        behind = reached_from(self.root)
        return {n for n in reached_from(*origins) & self.candidate.nodes if n not in behind and n not in origins}

    def _give(self, node: Node) -> bool:
        value = self.context.trace.value_of.get(node)
        if value is None or value.dtype not in SUPPORTED or self.states[node] != self.states[self.root] or self._written(node):
            return False
        if (calls := _log_sum_exp(self.lifted, value)) is not None:
            self.rows.append(RowStatistic(node, "lse", calls))
        elif not self.context.distributed and (found := self._weights(node, value)) is not None:
            self.weights.append(found)
        else:
            return False
        self.given.add(node)
        return True

    def _written(self, node: Node) -> bool:
        storage = storage_of(node)
        return any(storage_of(w) == storage for n in node.graph.nodes for w in writes(n))

    def _weights(self, node: Node, value: Value) -> WeightsOf | None:
        if memory_order(node) != tuple(range(len(value.shape))):  # who reads it may rely on how it lies
            return None
        weight, heads = _weights(self.lifted.read, value), None
        if weight is None and (mean := _mean(self.lifted.read, value)) is not None:
            weight, heads = mean
        if weight is not None and not isinstance(registry.named(self.context.target), Writes):
            self.lacks = f"target {self.context.target!r} has no kernels that write weights"
            return None
        return None if weight is None else WeightsOf(node, weight, value.dtype, dims(value), heads)


def weights_of(spec: AttentionSpec, of: WeightsOf) -> AttentionSpec:
    """The spec of the weights beside the result of ``spec``. Means are summed up, and given, in its log-sum-exp's dtype."""
    weight = spec.weight if of.weight is OWN else of.weight
    dtype = of.dtype if of.heads is None else spec.lse_dtype
    return replace(spec, weight=weight, out_dtype=dtype, out_order=tuple(range(spec.batch + 2)))


# --------------------------------------------------------------------------------------------------- log-sum-exp


def _log_sum_exp(lifted: Lifted, value: Value) -> Calls | None:
    """The calls that make ``value`` of the rows' log-sum-exp in the root's dimensions, if it holds that."""
    read, given = lifted.read, lifted.spec.lse_dtype
    rows = (*read.batch, read.q)
    axes = [rows[d] for d in lifted.out_dims if d < len(rows)]
    sizes, shape = read.reader.space.sizes, dims(value)
    kept = len(shape) == len(axes) + 1 and shape[-1] == 1
    if not (kept or len(shape) == len(axes)) or len(axes) > _ROW_AXES:
        return None
    for order in permutations(range(len(axes))):
        coords = [axes[i] for i in order]
        if any(sizes[x] != n for x, n in zip(coords, shape, strict=False)):
            continue
        element = read.reader.element(value, [*coords, *[sympy.Integer(0)] * kept])
        empty = empty_log_sum_exp(read.reader, element, read.softmax, read.k)
        if empty is not None:
            calls: Calls = () if list(order) == sorted(order) else ((aten.permute.default, (list(order),)),)
            calls += ((aten.nan_to_num.default, (math.nan, math.inf, math.nan)),) * (empty == "nan")
            calls += ((aten.unsqueeze.default, (-1,)),) * kept
            return calls + ((aten.to.dtype, (value.meta.dtype,)),) * (value.dtype != given)
    return None


# ------------------------------------------------------------------------------------------------------ weights


def _weights(read: Read, value: Value) -> Expr | None:
    """What ``value`` holds of each probability, where it has every batch index, query and key in the result's order."""
    axes, sizes = (*read.batch, read.q, read.k), read.reader.space.sizes
    for coords in [at for v, at, _ in read.reader.read() if v is value]:
        there = tuple(c for c in coords if c != 0)
        if any(n != sizes.get(c, 1) for c, n in zip(coords, dims(value), strict=True)):
            continue  # a part of it is no weight of a key, such as that of a sink
        if there == tuple(x for x in axes if x in there) and all(x in there or sizes[x] == 1 for x in axes):
            return _of_probability(read, read.reader.element(value, coords))
    return None


def _of_probability(read: Read, element: Expr) -> Expr | None:
    """``element`` as a function of the probability; OWN where the product with the values takes the same."""
    try:
        found = recognise(read.reader, element, None, read.k)
    except Declined:
        return None
    own = read.softmax
    if (found.score, found.extra_logits, found.safe) != (own.score, own.extra_logits, own.safe):
        return None
    if all(isinstance(n, (Apply, Const, Prob)) for n in expr.walk(found.weight)):
        return found.weight
    return OWN if _uncast(found.weight) is _uncast(own.weight) else None


def _uncast(e: Expr) -> Expr:
    return _uncast(e.operands[0]) if isinstance(e, Apply) and e.op == "cast" else e


def _mean(read: Read, value: Value) -> tuple[Expr, IndexExpr] | None:
    """Of a mean over neighbouring batch indices: what it is the mean of, and of how many."""
    if op_name(value) != "mean" or len(value.args) < 2 or len(value.args[1]) != 1:
        return None
    source: Value = value.args[0]
    shape, axis = dims(source), value.args[1][0] % len(source.shape)
    if len(shape) < 3 or axis != len(shape) - 3:
        return None
    r = read.reader
    coords = [sympy.Integer(0) if n == 1 else r.space.add(f"y{i}", n) for i, n in enumerate(shape)]
    found = r.through_views(source, coords)
    if not isinstance(found, Load):
        return None
    whole = r.leaves[found.operand]
    *batch, q, k = map(r.index, found.coords)
    same = r.space.flatten(batch, dims(whole)[:-2]) == r.space.flatten(coords[:-2], shape[:-2])
    weight = _weights(read, whole) if same and [q, k] == coords[-2:] else None
    return None if weight is None else (weight, shape[axis])
