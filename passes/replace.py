"""Puts fuse::attention into the graph in the place of a site's root, and removes what only the site had used."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from fuse.ir.gradient import differentiable
from fuse.ir.index import IndexExpr
from fuse.ir.serial import in_graph
from fuse.ir.spec import AttentionSpec, verify
from fuse.passes.beside import Beside, WeightsOf, weights_of
from fuse.passes.find import RowStatistic
from fuse.passes.layout import memory_order
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.read.elements import as_index
from fuse.passes.read.graph import (
    MADE,
    Transform,
    is_torchs,
    location,
    operator_name,
    reached_from,
    storage_of,
    tensor_of,
    user_name,
    writes,
)
from fuse.passes.read.trace import Seed, Trace, Value
from fuse.report.reasons import Declined, Mutated, NotSpread, NotTraceable, RandomNumbers, ScoresUsed, UnsupportedShape
from fuse.torch_private import CleanDiv, FloorDiv, schema, to_copy

aten = torch.ops.aten  # programs of torch.export hold nothing else
_SEED_OF = "seed of fuse"  # marks the seed of what a node draws
_RANDOM = ("rand", "dropout", "bernoulli", "normal", "multinomial", "uniform", "exponential")


@dataclass(frozen=True)
class Replacement:
    """A root and the node that now stands for it, with the site's spec as it was emitted.

    op      the call of fuse's operator behind it
    target  who computes it
    beside  other results and what stands for them
    given   what these are, in words
    weights their specs, of those that are weights
    lacks   see Beside
    leaves  the nodes behind spec.operands
    made    all nodes that were made for it, in order
    wanted  for each operand whether it wants a gradient
    around  transforms of torch.func that it stands in
    """

    root: Node
    result: Node
    op: Node
    target: str
    beside: tuple[tuple[Node, Node], ...]
    given: tuple[str, ...]
    weights: tuple[AttentionSpec, ...]
    lacks: str
    spec: AttentionSpec
    leaves: tuple[Node, ...]
    made: tuple[Node, ...]
    wanted: tuple[bool, ...]
    around: tuple[Transform, ...]

    @property
    def pairs(self) -> tuple[tuple[Node, Node], ...]:
        """All that is replaced, and by what."""
        return ((self.root, self.result), *self.beside)


def insert(
    graph: Graph,
    root: Node,
    beside: Beside,
    lifted: Lifted,
    context: SiteContext,
    around: tuple[Transform, ...],
) -> Replacement:
    """Emits the op before ``root``, or before who needs what is given ``beside`` it; nothing uses it yet. Raises Declined, and
    leaves the graph as it was, if it cannot.
    """
    if lifted.plan is not None and beside.words:
        raise Declined(NotSpread(f"{' and '.join(beside.words)} {'are' if beside.weights else 'is'} read, too"))
    spec = replace(lifted.spec, out_order=_out_order(root, lifted))
    verify(spec)
    trace, target = context.trace, context.target
    flowing = trace.value_of[root] in trace.flowing
    emitter = _Emitter(graph, root, beside.before, trace, lifted, flowing, around)
    with graph.inserting_before(beside.before):
        try:
            leaves = tuple(emitter.tensor(v) for v in lifted.leaves)
            sizes = [emitter.size(n) for n in lifted.sizes]
        except Declined:
            emitter.undo()
            raise
        first = len(emitter.new)
        op, result, others = _results(emitter, (list(leaves), sizes), spec, target, lifted, beside)
        if flowing and _may_be_written(graph, root):
            result = emitter.new_call(aten.clone.default, (result,), {})
    for node in emitter.new[first:]:
        node.meta.update(_traced(root))
    for old, new in ((root, result), *others):
        new.meta["example_value"] = old.meta.get("example_value")
    wanted = tuple(flowing and d and trace.flows(x) for x, d in zip(lifted.leaves, differentiable(spec), strict=True))
    return Replacement(
        root, result, op, target, others, beside.words, tuple(weights_of(spec, w) for w in beside.weights), beside.lacks,
        spec, leaves, tuple(emitter.new), wanted, around,
    )  # fmt: skip


def add_up(
    graph: Graph, terms: Sequence[Replacement], plain: Sequence[Value], lifted: Lifted, context: SiteContext
) -> tuple[Replacement, ...]:
    """``terms``, all of one root, with the sum of their results and of ``plain`` in its place; plain values are computed anew.

    Raises Declined, and leaves the graph without the terms, if one of these cannot be had. lifted: of any of the terms
    """
    root, around = terms[0].root, terms[0].around
    trace = context.trace
    emitter = _Emitter(graph, root, root, trace, lifted, trace.value_of[root] in trace.flowing, around)
    with graph.inserting_before(root):
        try:
            out, *others = [*(term.result for term in terms), *map(emitter.tensor, plain)]
        except Declined:
            emitter.undo()
            remove(graph, {n for term in terms for n in term.made})
            raise
        for other in others:
            out = emitter.new_call(aten.add.Tensor, (out, other), {})
        dtype = trace.value_of[root].meta.dtype
        if dtype in (torch.bfloat16, torch.float16):
            out = emitter.new_call(to_copy, (out,), {"dtype": dtype})
    for node in emitter.new:
        node.meta.update(_traced(root))
    for term in terms:
        del term.result.meta["example_value"]
    out.meta["example_value"] = root.meta.get("example_value")
    return tuple(replace(term, result=out, made=(*term.made, *emitter.new)) for term in terms)


def _traced(root: Node) -> dict[str, Any]:
    """What is known of where a node comes from."""
    return {k: v for k, v in root.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}


def _results(
    emitter: _Emitter, call: tuple[Any, Any], spec: AttentionSpec, target: str, lifted: Lifted, beside: Beside
) -> tuple[Node, Node, tuple[tuple[Node, Node], ...]]:
    """The op, and what has the root's dimensions: the result, and what stands for other nodes."""
    found: dict[str, Node] = {}
    matrices: list[Node] = []
    arguments: tuple[Any, ...] = (*call, in_graph(spec.to_json()), target)
    if beside.weights:
        texts = [in_graph(weights_of(spec, w).to_json()) for w in beside.weights]
        heads = [0 if w.heads is None else emitter.size(w.heads) for w in beside.weights]
        op = emitter.new_call(torch.ops.fuse.attention_rows.default, arguments, {})
        out, found["lse"], kept = (emitter.new_call(operator.getitem, (op, i), {}) for i in range(3))
        write, (operands, sizes) = torch.ops.fuse.attention_weights.default, call
        given = ((operands, kept, sizes, text, target, n) for text, n in zip(texts, heads, strict=True))
        matrices = [emitter.new_call(write, each, {}) for each in given]
    elif any(of.kind == "lse" for of in beside.rows):
        op = emitter.new_call(torch.ops.fuse.attention_lse.default, arguments, {})
        out, found["lse"] = (emitter.new_call(operator.getitem, (op, i), {}) for i in (0, 1))
    elif lifted.plan is not None:
        op = out = emitter.new_call(torch.ops.fuse.context_attention.default, (*arguments, in_graph(lifted.plan.to_json())), {})
    else:
        op = out = emitter.new_call(torch.ops.fuse.attention.default, arguments, {})
    if any(of.kind == "max" for of in beside.rows):
        found["max"] = emitter.new_call(torch.ops.fuse.attention_max.default, arguments[:-1], {})
    of_rows = [d for d in lifted.out_dims if d <= spec.batch]
    rows = ((of.node, _as_given(emitter, found[of.kind], of_rows, of)) for of in beside.rows)
    weights = ((w.node, _shaped(emitter, m, spec, w)) for w, m in zip(beside.weights, matrices, strict=True))
    if lifted.features:
        out = emitter.new_call(aten.unflatten.int, (out, -1, list(lifted.features)), {})
    return op, emitter.permuted(out, lifted.out_dims), (*rows, *weights)


def _shaped(emitter: _Emitter, matrix: Node, spec: AttentionSpec, of: WeightsOf) -> Node:
    """The weights that the op gives as the node that it stands for has them."""
    if of.heads is not None or len(of.shape) != spec.batch + 2:
        matrix = emitter.new_call(aten.view.default, (matrix, [emitter.size(n) for n in of.shape]), {})
    dtype: torch.dtype = getattr(torch, of.dtype)
    return matrix if of.heads is None or of.dtype == spec.lse_dtype else emitter.new_call(aten.to.dtype, (matrix, dtype), {})


def _out_order(root: Node, lifted: Lifted) -> tuple[int, ...]:
    """The op's dimensions from outermost to innermost in memory, as those of the root are."""
    order = [lifted.out_dims[d] for d in memory_order(root)]
    if lifted.features:
        last = len(order) - len(lifted.features)
        together = list(range(last, len(order)))
        at = order.index(last)
        if order[at : at + len(together)] != together:
            raise Declined(UnsupportedShape("feature dimensions of the result lie apart in memory"))
        order[at : at + len(together)] = [last]
    return tuple(order)


def _as_given(emitter: _Emitter, rows: Node, dims: Sequence[int], of: RowStatistic) -> Node:
    """What the op says of rows as the operator that it stands for does."""
    node = emitter.permuted(rows, dims)
    for function, given in of.calls:
        node = emitter.new_call(function, (node, *given), {})
    return node


class _Emitter:
    """Values of the trace as nodes before the root: existing ones where they hold the value, new ATen calls else."""

    def __init__(
        self, graph: Graph, root: Node, before: Node, trace: Trace, lifted: Lifted, flowing: bool, around: tuple[Transform, ...]
    ) -> None:  # fmt: skip
        self.graph = graph
        self.before = before
        self.trace = trace
        self.around = around  # values of a transform's level are not to be had outside of it
        self.saves = flowing  # operands are kept for the backward pass, in which they must be what they were
        # What is computed from the scores, if only from their shape, would keep them alive
        self.of_scores = set().union(*(reached_from(value.origin) for value in lifted.scores))
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.read_over = _between([n for v in lifted.leaves if (n := self._held(v)) is not None], root)
        self.made: dict[Value, Node] = {}
        self.new: list[Node] = []

    def tensor(self, value: Value) -> Node:
        if isinstance(value, Seed):
            return self._seed(value)
        if value not in self.made:
            node = self._held(value)
            self.made[value] = self._again(value) if node is None else self._unwritten(node)
        return self.made[value]

    def _held(self, value: Value) -> Node | None:
        """The node that has the value before the root, if it may be read."""
        node = self.trace.node_of.get(value)
        usable = node is not None and self.order[node] < self.order[self.before] and node not in self.of_scores
        return node if usable else None

    def _unwritten(self, node: Node) -> Node:
        """The node if at the root its memory holds what the trace read there, else a copy from before it was written."""
        storage = storage_of(node)
        shared = [n for n in self.order if storage is not None and storage_of(n) == storage]
        writers = [w for n in shared for w in n.users if any(storage_of(x) == storage for x in writes(w))]
        writers = [w for w in writers if self.order[w] > self.order[node]]  # what was written before is what the node has
        ran = {u for n in shared for u in n.users if u in self.trace.ran}
        readers = [self.order[u] for u in ran if u in self.read_over or u in writers]  # what the trace wrote it had read
        for writer in sorted(writers, key=self.order.__getitem__):
            at, root = self.order[writer], self.order[self.before]
            if writer in self.trace.ran and node in self.trace.ran:
                if at > root:
                    raise Declined(Mutated(user_name(node), location(writer)))
            elif at < root and (writer in ran or min(readers, default=at) < at):  # what it held when it was read is meant
                if max(readers) > at and writer not in self.trace.ran:  # the trace has what it ran in order
                    raise Declined(Mutated(user_name(node), location(writer)))
                with self.graph.inserting_before(writer):
                    return self.new_call(torch.ops.fuse.snapshot.default, (node,), {})
            elif self.saves and at > root:
                return self.new_call(torch.ops.fuse.snapshot.default, (node,), {})
        return node

    def _seed(self, seed: Seed) -> Node:
        """Drawn where the numbers were, once for all sites that read them."""
        origin = seed.origin
        assert origin is not None
        before: Node = origin.prev
        if before.meta.get(_SEED_OF) is origin:
            return before
        with self.graph.inserting_before(origin):
            node = self.new_call(aten.randint.default, (2**63 - 1, [1]), {"dtype": torch.int64, "device": seed.meta.device})
        node.meta[_SEED_OF] = origin
        return node

    def _again(self, value: Value) -> Node:
        if value.literal is not None:
            return self._call(aten.full.default, ([], value.literal), {"dtype": value.meta.dtype, "device": value.meta.device})
        if value.op is None or torch.Tag.nondeterministic_seeded in value.op.tags:
            node = self.trace.node_of.get(value)
            if node in self.of_scores:
                raise Declined(ScoresUsed(operator_name(node), location(node)))
            if value.op is not None:
                raise Declined(RandomNumbers(f"those of {schema(value.op).name} are needed as a tensor"))
            raise Declined(NotTraceable("a tensor that the graph does not hold"))
        args, kwargs = self._arguments(value.args), self._arguments(dict(value.kwargs))
        if value.op is aten.copy.default:  # of which autograd has no derivative
            return self.new_call(aten.copy_.default, (self.new_call(aten.empty_like.default, args[:1], {}), args[1]), {})
        node = self._call(value.op, args, kwargs)
        returns = schema(value.op).returns
        if len(returns) > 1 or isinstance(returns[0].type, torch.ListType):
            node = self._call(operator.getitem, (node, value.output), {})
        return self._call(aten.detach.default, (node,), {}) if value in self.trace.stops else node

    def _arguments(self, x: Any) -> Any:
        if isinstance(x, Value):
            return self.tensor(x)
        if isinstance(x, (torch.SymInt, sympy.Expr)):
            return self.size(x if isinstance(x, sympy.Expr) else as_index(x))
        if isinstance(x, (tuple, list)):
            return type(x)(self._arguments(y) for y in x)
        if isinstance(x, dict):
            return {k: self._arguments(v) for k, v in x.items()}
        return x

    def size(self, n: IndexExpr) -> int | Node:
        """An integer of the graph with the value n."""
        if n.is_Integer:
            return int(n)
        if (found := self._symbol(n)) is not None:
            return found
        if isinstance(n, (FloorDiv, CleanDiv)):
            return self._call(operator.floordiv, tuple(self.size(x) for x in n.args), {})
        functions = {"Add": operator.add, "Mul": operator.mul, "Max": torch.sym_max, "Min": torch.sym_min, "Pow": operator.mul}
        if (function := functions.get(type(n).__name__)) is not None:
            first, *terms = [n.base] * int(n.exp) if n.is_Pow else n.args  # sizes that are equal have one symbol
            out = self.size(first)
            for term in terms:
                out = self._call(function, (out, self.size(term)), {})
            return out
        raise Declined(UnsupportedShape(f"the size {n} is not to be had from the graph"))

    def _symbol(self, n: IndexExpr) -> Node | None:
        """A size that the graph holds, or one that differs from it by a number: s from a tensor of s + 1 positions."""
        for node, at in self.order.items():
            if at >= self.order[self.before]:
                break
            value, tensor = node.meta.get("example_value"), tensor_of(node)
            if isinstance(value, torch.SymInt) and (off := _difference(value, n)) is not None:
                return self._less(node, off)
            for dim, size in enumerate(() if tensor is None or node.op != "placeholder" else tensor.shape):
                if isinstance(size, torch.SymInt) and (off := _difference(size, n)) is not None:
                    return self._less(self._call(aten.sym_size.int, (node, dim), {}), off)
        return None

    def _less(self, node: Node, off: int) -> Node:
        return node if off == 0 else self._call(operator.sub, (node, off), {})

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """The call, or the same one before: sites that read the same table share it, and nobody writes what is made here."""
        alike: Iterable[Node] = self.graph.find_nodes(op="call_function", target=target, sort=False)
        for node in alike:
            same = repr((node.args, dict(node.kwargs))) == repr((args, kwargs))  # tells 1 from True and from 1.0
            if node.meta.get(MADE) == self.around and same and self.order.get(node, -1) < self.order[self.before]:
                return node
        node = self.new_call(target, args, kwargs)
        node.meta[MADE] = self.around
        return node

    def new_call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        self.new.append(node)
        return node

    def permuted(self, node: Node, dims: Sequence[int]) -> Node:
        return node if list(dims) == list(range(len(dims))) else self.new_call(aten.permute.default, (node, list(dims)), {})

    def undo(self) -> None:
        for node in reversed(self.new):
            self.graph.erase_node(node)


def _between(leaves: Sequence[Node], root: Node) -> set[Node]:
    """What ``root`` is computed by from ``leaves``, and itself."""
    found: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(n for n in node.all_input_nodes if n not in leaves)
    return found


def _may_be_written(graph: Graph, root: Node) -> bool:
    """Whether somebody writes to the result or gets it to do so. The backward pass reads it, eager's does not."""
    storage = storage_of(root)
    if any(storage_of(written) == storage for n in graph.nodes for written in writes(n)):
        return True
    return any(storage_of(n) == storage for n in graph.output_node().all_input_nodes)


def _difference(a: torch.SymInt, b: IndexExpr) -> int | None:
    """a - b where that is a number."""
    off = sympy.expand(as_index(a) - b)
    return int(off) if off.is_Integer else None


def live_nodes(graph: Graph, slices: Iterable[Node], replaced: Mapping[Node, Node]) -> set[Node]:
    """The nodes that still matter once each root in ``replaced`` is read from its replacement.

    Whatever lies outside of the slices matters; nodes of slices do if something that matters reads them, or the memory
    that they write.
    """
    inside = set(slices)
    roots = {storage_of(n) for n in replaced}
    made = set().union(
        *map(reached_from, (*replaced, *replaced.values()))
    )  # what reads a root's memory reads the replacement's
    live: set[Node] = set()
    later: set[int | None] = set()  # memory of roots that is read, and that others may write to when it is the replacement's
    stack = [n for n in graph.nodes if n not in inside]
    while True:
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                later |= {storage_of(x) for x in node.all_input_nodes if x in replaced}
                stack.extend(replaced.get(x, x) for x in node.all_input_nodes)
        memory = {storage_of(n) for n in live if n not in made or storage_of(n) not in roots}
        written = {n: memory | later if n in made and n not in replaced else memory for n in inside - live}
        stack = [n for n, of in written.items() if any(storage_of(w) in of - {None} for w in writes(n))]
        if not stack:
            return live


def unread_nodes(graph: Graph, slices: set[Node]) -> set[Node]:
    """What is computed from slices, without an effect, for nobody: weights that a layer returns and its model drops."""
    behind: set[Node] = set()
    for node in graph.nodes:
        if any(n in slices or n in behind for n in node.all_input_nodes):
            behind.add(node)
    found: set[Node] = set()
    for node in (n for n in reversed(graph.nodes) if n in behind):
        drawn = any(word in operator_name(node) for word in _RANDOM)
        idle = is_torchs(node) and not drawn and not writes(node)
        known = operator_name(node) == "_assert_tensor_metadata"  # of values that need not be, and are as they are known to be
        if idle and (known or tensor_of(node) is not None) and all(u in found for u in node.users):
            found.add(node)
    return found


def remove(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erases ``nodes``, users first."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in sorted(nodes, key=lambda n: -order[n]):
        graph.erase_node(node)
