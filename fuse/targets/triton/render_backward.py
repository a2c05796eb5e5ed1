"""The backward kernels of a spec as one Triton module: what ``fuse.ir.gradient`` says, by ``templates/triton/backward*.jinja``.

What is known of each row (delta, and the softmax's sums where log-sum-exp has lost them) comes first. Then gradients of keys,
a program for each tile of keys; of queries, a program for each block of queries; and where a table is read by the distance of
query and key, of these, a program for each block of distances. All of them compute the scores again, so that every sum has
one owner and one order (FlashAttention-2, Dao 2023, section 3.1.2).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fuse.ir import expr
from fuse.ir.expr import HALVES, Apply, Const, Expr, Index, Load, Prob, Score, apply, const
from fuse.ir.operators import OPERATORS
from fuse.ir.spec import AttentionSpec
from fuse.kernel.backward import Added, BackwardProgram, Results, backward_program, is_one, recomputed_above
from fuse.kernel.destinations import Destination, Unsupported
from fuse.kernel.forward import Bound
from fuse.kernel.rectangles import rows_of
from fuse.kernel.source import ENTRY, header_lines
from fuse.targets.triton.arguments import Arguments, strides
from fuse.targets.triton.outline import rendered
from fuse.targets.triton.plan import widened
from fuse.targets.triton.render import ENDS, lanes_within, mask_axes
from fuse.targets.triton.render_tiles import is_listed
from fuse.targets.triton.walk import Limit, Walk
from fuse.targets.triton.write import Block, TritonWriter, depends

# What the kernel of queries may copy by tensor descriptors. That of keys, whose tiles are smaller, would gain nothing.
COPIED = ("key", "value")
# Kinds of destinations whose elements a kernel finds by their tensor's strides; others are sums, and lie side by side.
PLACED = ("matrix", "dense", "shared")
# By a bound of keys: which ends of a walk over queries it tells, each by one of the keys k0 to k1.
_SOUGHT = {"upper": {"begin": "k0", "full_begin": "k1"}, "lower": {"end": "k1", "full_end": "k0"}}
# log2(e)
_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Text:
    """A value, and the statements that it needs; ``copied``: a tile by its tensor descriptor, if there may be one."""

    lines: Sequence[str]
    result: str
    copied: str = ""


@dataclass(frozen=True)
class TileEntries:
    """What happens to the entries of a tile between the products: statements, then ``results``."""

    lines: Sequence[str]
    results: Results


@dataclass(frozen=True)
class _Kernel:
    """Writes what one kernel computes. ``owner``: "q" or "k", the position that a program keeps; it visits the other one. With
    "k - q" it keeps distances, and visits queries and keys together.

    described  tiles may be copied by tensor descriptors
    per_batch  what is computed once for a batch index
    per_owned  what is computed once for each position that is kept
    """

    computed: BackwardProgram
    owner: str
    count: list[int]
    described: bool = False
    per_batch: Block = field(default_factory=Block)
    per_owned: Block = field(default_factory=Block)

    @property
    def spec(self) -> AttentionSpec:
        return self.computed.spec

    @property
    def visited(self) -> str:
        return "q" if self.owner == "k" else "k"

    def writer(self, tile: Block | None = None, as_eager: bool = False, names: dict[str, str] | None = None) -> TritonWriter:
        def place(axes: frozenset[str]) -> Block:
            varying = axes & {"q", "k", "d", "e"}
            return self.per_batch if not varying else self.per_owned if varying == {self.owner} or tile is None else tile

        drawn = {"q": "f_uniform_along({}, k0, BN)", "k": "f_uniform_down({}, k0, BN, BM)"}.get(self.owner, "")
        return TritonWriter(place, _real(self.spec), self.count, as_eager, names=names or {}, drawn=drawn)

    def value(self, node: Expr, **names: str) -> Text:
        """``node``, of positions that have other names."""
        here = Block()

        def place(axes: frozenset[str]) -> Block:
            return here if axes & {"q", "k"} else self.per_batch

        return Text(here.lines, TritonWriter(place, _real(self.spec), self.count, names=names).value(node))

    # ------------------------------------------------------------------------------------------------------- tiles

    def matrix(self, name: str) -> Text:
        """A tile of query, key or value, in the dtype of the products; positions that are visited are ``row``, a column."""
        here, load = Block(), getattr(self.spec, name)
        writer = TritonWriter(lambda _: here, _real(self.spec), self.count, names={self.visited: "row"})
        feature, width = ("e", widened(self.spec.v_dim)) if name == "value" else ("d", widened(self.spec.qk_dim))
        axis, count = ("q", "BM") if name == "query" else ("k", "2 * BM" if self.owner == "k - q" else "BN")
        guards = [f"{feature}_ok", f"{writer.names.get(axis, axis)}_ok"]
        pointer, rows = f"p{load.operand} + {writer.offset(load)}", rows_of(load)
        loaded = writer.tile(load, pointer, f"{count}, {width}", guards, cast=not _one_dtype(self.spec))
        copied = writer.copied(load, rows, name, width) if rows is not None and self.described and name in COPIED else ""
        return Text(here.lines, loaded, copied)

    def like_out(self, tensor: str) -> str:
        """A tile of a tensor of the result's shape."""
        names = [*(f"b{i}" for i in range(self.spec.batch)), "row" if self.owner == "k" else "q", "e"]
        places = zip(names, strides(tensor, len(names)), strict=True)
        offset = " + ".join(f"tl.cast({name}, tl.int64) * {stride}" for name, stride in places)
        text = f"tl.load({tensor} + {offset}, mask={names[-2]}_ok & e_ok, other=0)"
        return text if _one_dtype(self.spec) else f"tl.cast({text}, {_real(self.spec)})"

    def places(self, found: Sequence[Destination]) -> list[dict[str, object]]:
        """The destinations that the kernel writes, and where the elements of their gradients are."""
        places = []
        for to in written_by(self.owner, found):
            here = Block()
            writer = TritonWriter(lambda _, here=here: here, _real(self.spec), self.count)  # type: ignore[misc]
            kind = destination_kind(to)
            offset = writer.offset(to.load, strides=f"s_grad_{to.name}") if kind in PLACED else ""
            offset += "".join(f" + 0 * {axis}" for axis in to.once)  # as many places as there are values
            names = strides(f"grad_{to.name}", len(to.order)) if kind in PLACED else []
            places.append({"name": to.name, "kind": kind, "strides": names, "place": Text(here.lines, offset)})
        return places

    # ----------------------------------------------------------------------------------------------------- entries

    def seen(self, writer: TritonWriter) -> str:
        """What must hold for an entry of a tile that is not seen entirely, or has fewer positions than others."""
        forward = self.computed.forward
        residual = forward.residual
        if self.owner == "q":
            bounds = lanes_within(self.spec, writer)
        else:
            bounds = [f"(k {'>=' if b.name == 'lower' else '<'} {writer.value(b.node)})" for b in forward.bounds]
            bounds = [f"{self.visited}_ok", *bounds]
        return " & ".join([*bounds, *([] if residual is None else [writer.value(residual)])])

    def any(self) -> Text:
        """Which entries of a tile are seen."""
        tile = Block()
        return Text(tile.lines, self.seen(self.writer(tile)))

    def entries(self, found: Sequence[Destination], full: bool) -> TileEntries:
        """Of a tile that is seen entirely, or of one that may not be."""
        computed, tile = self.computed, Block()
        forward, slope, factors = computed.forward, computed.slope, computed.factors
        writer = self.writer(tile)
        _give_leaves(writer, forward.visible, slope, self.spec.weight, computed.of.weight, *factors)
        prob = f"tl.exp2({self.power(score := writer.value(forward.visible))} - row_lse2)"
        if not self.spec.softmax:
            prob = f"{score} * {forward.factor!r} * row_inverse"
        if not full:
            tile.lines.append(f"seen = {self.seen(writer)}")
        tile.lines.append(f"prob = {prob if full else f'tl.where(seen, {prob}, 0.0)'}")
        text = "d_score" if is_one(slope) else f"d_score * {writer.value(slope)}"
        return self._results(tile, writer, text, factors, found, "{}" if full else "tl.where(seen, {}, 0.0)")

    def power(self, score: str) -> str:
        """A visible score in base 2. Of rows that are normalised again it is bounded: less infinity it has to be -inf."""
        factor, largest = self.computed.forward.factor * _LOG2E, 1e307 if self.spec.lse_dtype == "float64" else 1e38
        added = any(
            isinstance(n, Load) or (isinstance(n, Const) and abs(n.value) >= largest)
            for n in expr.walk(self.computed.forward.visible)
            if n.dtype in expr.FLOATS
        )
        bounded = f"tl.minimum({score}, {largest / max(1.0, factor)!r})" if added else score
        return f"{bounded} * {factor!r}"

    def recomputed(self, found: Sequence[Destination]) -> TileEntries:
        """Of all entries of the rows that are ``exact``, whose largest score is ``m`` and log-sum-exp ``m + log_l``."""
        of, tile = self.computed.of, Block()
        factors = [t.factor for t in of.terms]
        writer = self.writer(tile, as_eager=self.computed.as_eager)
        _give_leaves(writer, self.spec.score, of.score, self.spec.weight, of.weight, *factors)
        prob = f"tl.exp2(({writer.value(self.spec.score)} - m - log_l) * {_LOG2E!r})"
        tile.lines.append(f"prob = tl.where(exact & {self.visited}_ok, {prob}, 0.0)")
        writer.as_eager = False
        text = f"d_score * {writer.value(of.score)} * {1 / self.computed.scale!r}"
        return self._results(tile, writer, text, factors, found, "{}")

    def _results(
        self, tile: Block, writer: TritonWriter, slope: str, factors: Sequence[Expr], found: Sequence[Destination], visible: str
    ) -> TileEntries:
        """``visible``: gives what is computed, if the entry is seen."""
        weight, gate = self.spec.weight, self.computed.of.weight
        weighed = visible.format(writer.value(weight)) if self.computed.forward.weighted else "prob"
        gated = "d_weight" if is_one(gate) else f"{writer.value(gate)} * d_weight"
        small, terms = [s for s in found if s.kind != "matrix"], []
        for to, term, factor in zip(small, self.computed.of.terms, factors, strict=True):
            if to.kind != "logit":
                outer = "d_weight" if term.root == "weight" else "d_score"
                text = outer if is_one(factor) else f"{outer} * {writer.value(factor)}"
                terms.append(Added(to.name, destination_kind(to), visible.format(text)))
        rate = "prob" if self.spec.softmax else "row_inverse"
        slope = slope if slope == "d_score" and self.spec.softmax else visible.format(slope)
        return TileEntries(tile.lines, Results(weighed, rate, gated, slope, tuple(terms)))

    def scores(self) -> Text:
        """The scores of a tile as eager rounds them."""
        tile = Block()
        writer = self.writer(tile, as_eager=self.computed.as_eager)
        _give_leaves(writer, self.spec.score)
        return Text(tile.lines, writer.value(self.spec.score))

    # ------------------------------------------------------------------------------------------------------ bounds

    def summary(self) -> dict[str, object]:
        """What tells delta and, of the exact rows, the softmax."""
        extras = [self.writer().value(x) for x in self.spec.extra_logits]
        return {"out": self.like_out("out"), "scores": self.scores(), "extras": extras, "walk": Walk("k")}

    def limits(self) -> list[Limit]:
        """Of the keys that queries q0 to q1 see, or of the queries that see keys k0 to k1."""
        of = self._bounded if self.owner == "q" else self._sought
        return [limit for b in self.computed.forward.bounds for limit in of(b)]

    def _bounded(self, bound: Bound) -> Iterator[Limit]:
        for at, name in ENDS[bound.name].items():
            value = self.value(bound.node, q=at)
            yield Limit(name, value.lines, value.result)

    def _sought(self, bound: Bound) -> Iterator[Limit]:
        """Where the bound is q + shift it is solved for q, else searched."""
        shift = _shift(bound.node)
        value = self.value(bound.node, q="middle") if shift is None else self.value(shift)
        for name, key in _SOUGHT[bound.name].items():
            if shift is None:
                yield Limit(name, value.lines, value.result, beyond=key)
            else:
                yield Limit(name, value.lines, f"{key} - ({value.result}) + 1")

    # ----------------------------------------------------------------------------------------------------- context

    def context(self) -> dict[str, object]:
        return {
            **{name: self.matrix(name) for name in ("query", "key", "value")},
            "grad": self.like_out("grad_out"), "per_batch": self.per_batch, "per_owned": self.per_owned,
        }  # fmt: skip

    def programs(self, found: Sequence[Destination]) -> dict[str, object]:
        recomputed = None if self.computed.recomputed_below is None else self.recomputed(found)
        return {"full": self.entries(found, full=True), "partial": self.entries(found, full=False), "recomputed": recomputed}

    def walk(self) -> Walk:
        residual, limits = self.computed.forward.residual, self.limits()
        names = {limit.name for limit in limits}
        tail = self.owner == "q" or not self._harmless_tail()
        listed = is_listed(self.spec, self.owner)
        shown = None if residual is None or listed or self.owner != "k" else self.writer().value(residual)
        return Walk(
            self.visited, limits, listed, starts_partial=shown is not None or "begin" in names,
            ends_partial=tail or "end" in names, full=not listed, shown=shown,
        )  # fmt: skip

    def _harmless_tail(self) -> bool:
        """Whether what lies behind the last query adds nothing: its probabilities are zero, if the rest of it is finite."""
        computed = self.computed
        roots = (computed.forward.visible, computed.slope, self.spec.weight, computed.of.weight, *computed.factors)
        found = (n for n in expr.walk(*roots) if "q" in depends(n))
        return all(isinstance(n, (Index, Score, Prob)) or (isinstance(n, Apply) and _is_finite(n)) for n in found)


def render_backward(spec: AttentionSpec, wanted: Sequence[bool], described: bool = False) -> str:
    """One Python module with the kernels ENTRY_rows, ENTRY_keys, ENTRY_queries and ENTRY_distances. Raises Unsupported.

    described  the kernel of queries may copy tiles by tensor descriptors
    """
    computed = backward_program(spec, tuple(wanted))
    found = computed.destinations
    _check(found)
    count = [0]
    rows, keys, distances = (_Kernel(computed, owner, count) for owner in ("q", "k", "k - q"))
    queries = _Kernel(computed, "q", count, described)
    kernels = {name: kernel.context() | kernel.programs(found) | {"destinations": kernel.places(found)}
               for name, kernel in (("keys", keys), ("queries", queries), ("distances", distances))}  # fmt: skip
    names = ", ".join(s.name if s.kind == "matrix" else str(s.load) for s in found)
    lines = (
        f"gradients of {names}, as fuse.ir.gradient has them, of",
        *header_lines(spec),
        f"wanted  {json.dumps(list(wanted))}",
    )
    context = Arguments(spec).names() | {
        "entry": ENTRY, "out_strides": strides("out", spec.batch + 2), "grad_out_strides": strides("grad_out", spec.batch + 2),
        "batch": spec.batch, "mask_axes": mask_axes(spec), "qk_dim": spec.qk_dim, "v_dim": spec.v_dim,
        "width": widened(spec.qk_dim), "v_width": widened(spec.v_dim),
        "factor": repr(computed.scale), "real": _real(spec), "log2e": repr(_LOG2E),
        "normalisation": spec.normalisation, "softmax": spec.softmax,
        "recomputed_below": computed.recomputed_below, "recomputed_above": recomputed_above(spec.lse_dtype),
        "as_eager": computed.as_eager,
        "rows": rows.context() | rows.summary(),
        "keys": kernels["keys"] | {"walk": keys.walk()}, "queries": kernels["queries"] | {"walk": queries.walk()},
        "distances": kernels["distances"] | {"any": distances.any()} if written_by("k - q", found) else None,
    }  # fmt: skip
    return rendered("backward", spec, lines, context)


def written_by(owner: str, found: Sequence[Destination]) -> list[Destination]:
    """The destinations that are written by the kernel that keeps keys ("k"), queries ("q") or distances ("k - q")."""
    kinds = {"k": ("key", "value", "dense"), "q": ("query", "row", "shared"), "k - q": ("entry",)}[owner]
    return [s for s in found if (s.name if s.kind == "matrix" else destination_kind(s)) in kinds]


def destination_kind(to: Destination) -> str:
    """That of the destination; "shared" where entries share elements in another way than by distance: they add atomically."""
    return "shared" if to.kind == "entry" and not all(map(_of_distance, to.load.coords)) else to.kind


def _check(found: Sequence[Destination]) -> None:
    for to in found:
        if to.kind in ("matrix", "dense") and any(isinstance(n, Load) for c in to.load.coords for n in expr.walk(c)):
            raise Unsupported(f"{to.load} is read at a place that is read")


def _of_distance(node: Expr) -> bool:
    """Whether entries of one distance k - q have one value."""
    if isinstance(node, Apply) and node.op == "sub" and all(isinstance(x, Index) for x in node.operands):
        return True
    return not isinstance(node, Index) or node.axis not in ("q", "k") if not node.args else all(map(_of_distance, node.args))


def _shift(node: Expr) -> Expr | None:
    """rest, where ``node`` is q + rest and q takes no part in that."""
    if isinstance(node, Index):
        return const(0) if node.axis == "q" else None
    if not isinstance(node, Apply) or node.op not in ("add", "sub"):
        return None
    a, b = node.operands
    if "q" in expr.axes(b):
        a, b = b, a
    if "q" in expr.axes(b) or (node.op == "sub" and a is not node.operands[0]):
        return None
    rest = _shift(a)
    return None if rest is None else apply(node.op, rest, b, dtype=node.dtype)


def _is_finite(n: Apply) -> bool:
    return OPERATORS[n.op].finite or (n.op == "div" and isinstance(n.operands[1], Const) and n.operands[1].value != 0)


def _give_leaves(writer: TritonWriter, *roots: Expr) -> None:
    for leaf in expr.walk(*roots):
        if isinstance(leaf, Score):
            rounded = writer.as_eager and leaf.dtype in HALVES
            writer.leaves[leaf] = f"tl.cast(tl.cast(raw, tl.{leaf.dtype}), {writer.real})" if rounded else "raw"
        if isinstance(leaf, Prob):
            writer.leaves[leaf] = "prob"


def _real(spec: AttentionSpec) -> str:
    return "tl.float64" if spec.lse_dtype == "float64" else "tl.float32"


def _one_dtype(spec: AttentionSpec) -> bool:
    return len({spec.query.dtype, spec.key.dtype, spec.value.dtype, spec.out_dtype}) == 1
