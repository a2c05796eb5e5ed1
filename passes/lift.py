"""From a traced slice to an AttentionSpec: reads the result's element backwards and recognises

    sum over k of weight(softmax over k of score(sum over d of q * k)) * v

by its mathematics; in the place of the softmax there may be nothing, or a division by the sum over k. Everything else that
the element depends on becomes an operand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import sympy
import torch
from torch.fx import Node

from fuse.ir import expr
from fuse.ir.expr import Apply, Const, Expr, Load, Score, apply, const
from fuse.ir.index import IndexExpr, linear
from fuse.ir.philox import drawn_in
from fuse.ir.spec import AttentionSpec, Operand
from fuse.ir.text import to_text
from fuse.parallel.plan import Plan
from fuse.passes.lookups import hoist_lookups
from fuse.passes.policy import Contents
from fuse.passes.predicate import REPLACED, separate
from fuse.passes.read import pointwise, views  # noqa: F401  the readers register themselves
from fuse.passes.read.elements import POLYNOMIAL, PRODUCTS, Opaque, Reader, as_index, dims, may_wrap, summed_into
from fuse.passes.read.graph import reached_from
from fuse.passes.read.joined import joined_products, joined_scores
from fuse.passes.read.mixed import check_before
from fuse.passes.read.products import Product, Side, product_of
from fuse.passes.read.random import with_scaled_choices
from fuse.passes.read.softmax import DeferredNormalisation, Softmax, recognise, unnormalised
from fuse.passes.read.statistics import check_statistics
from fuse.passes.read.trace import Trace, Value, computed
from fuse.report.reasons import (  # fmt: skip
    Declined,
    IntegersWrap,
    NoScoreProduct,
    NotLinear,
    NotSoftmax,
    RandomNumbers,
    UnsupportedShape,
    UnsupportedType,
)

_FEATURES = 256  # of all feature dimensions together
_SPECIALISATIONS = 4  # feature dimensions of query and value, with something to spare
SUPPORTED = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Read:
    """How a site was read, for who reads on beside its result: the softmax in terms of the trace's axes.

    batch, q, k  the axes that the spec calls b0, b1, …, q and k
    """

    reader: Reader
    softmax: Softmax
    batch: tuple[sympy.Symbol, ...]
    q: sympy.Symbol
    k: sympy.Symbol


@dataclass(frozen=True)
class Lifted:
    """What ``replace`` needs to put the op into the graph.

    leaves     the tensors behind spec.operands
    sizes      the values of spec.symbols
    out_dims   root dimension → dimension of the op's result
    features   sizes of what the op's last dimension has to be split into, if it stands for several of the root's
    plan       of a sequence that lies on several ranks: see fuse.parallel.plan
    scores     the products of query and keys, which must not be used elsewhere
    read       see Read
    relied     of what it is known what they hold, on which the spec relies
    """

    spec: AttentionSpec
    leaves: tuple[Value, ...]
    sizes: tuple[IndexExpr, ...]
    out_dims: tuple[int, ...]
    scores: tuple[Value, ...]
    read: Read
    relied: tuple[Node, ...] = ()
    features: tuple[int, ...] = ()
    plan: Plan | None = None


@dataclass(frozen=True)
class SiteContext:
    """What passes may look at beside the site: the trace that it was read from, the target of its kernel, what tensors hold,
    where the sequence lies, if that is on several ranks, and whether the graph's tensors there are DTensors."""

    trace: Trace
    target: str
    contents: Contents = Contents()
    plan: Plan | None = None
    distributed: bool = False


class Pass(Protocol):
    """From a spec to one that computes the same and says more of it; a site that does not concern it stays as it is."""

    __name__: str

    def __call__(self, lifted: Lifted, context: SiteContext, /) -> Lifted: ...


def lift(out: Value, trace: Trace, softmax: bool = True) -> Lifted:
    """The spec of what ``out`` is, with a softmax or without. Raises Declined with the reason that blocked it."""
    if out.dtype not in SUPPORTED:
        raise Declined(UnsupportedType(f"the result is {out.dtype}"))
    for _ in range(_SPECIALISATIONS):
        try:
            reader = Reader(held=trace.node_of, stops=trace.stops if trace.flows(out) else ())
            return _Lift(reader, out, softmax).run()
        except _Specialised:
            continue  # as a rule the sizes of the trace now show the number
        except _SeveralFeatures as several:
            return _lift_joined(out, several.dims, trace, softmax)
    raise Declined(UnsupportedShape("a feature dimension is a formula of several sizes"))


class _Specialised(Exception):
    """A size was fixed to its number, with a guard: what was read before still has the symbol."""


class _SeveralFeatures(Exception):
    """The values have several feature dimensions: these of the result, from outermost to innermost in theirs."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__(dims)
        self.dims = tuple(dims)


def _lift_joined(out: Value, features: Sequence[int], trace: Trace, softmax: bool) -> Lifted:
    """``out`` read with its feature dimensions as one."""
    others = [d for d in range(len(out.shape)) if d not in features]
    joined = computed([out], lambda x: x.permute(*others, *features).flatten(len(others)))
    lifted = lift(joined, trace, softmax)
    place = {d: lifted.out_dims[i] for i, d in enumerate(others)} | {d: len(others) + i for i, d in enumerate(features)}
    out_dims = tuple(place[d] for d in range(len(out.shape)))
    return replace(lifted, out_dims=out_dims, features=tuple(int(out.shape[d]) for d in features))


class _Lift:
    def __init__(self, reader: Reader, out: Value, softmax: bool) -> None:
        self.r = reader
        self.out = out
        self.softmax = softmax
        self.shape = dims(out)
        self.axes = [reader.space.add(f"x{i}", n) for i, n in enumerate(self.shape)]

    def run(self) -> Lifted:
        if any(n == 0 for n in self.shape):
            raise Declined(UnsupportedShape("an empty result"))
        product, deferred = self._result()
        k = product.over
        probs, values = self._probabilities_and_values(product)
        q, e = self._row_and_feature(probs, values, k)
        self.r.inner = {q, k, e}
        weights = self.r.element(*probs)
        softmax = (recognise if self.softmax else unnormalised)(self.r, weights, deferred, k)
        if any({k.name, e.name} & expr.axes(z) for z in softmax.extra_logits):
            raise Declined(NotSoftmax("what is added to the sum differs by key or feature"))
        score, scores, query, key, d = self._score(softmax, q, k)
        if self.r.space.sizes[k] == 0 or self.r.space.sizes[d] == 0:
            raise Declined(UnsupportedShape("a sum over nothing"))
        value = self._operand(*values)
        return self._assemble(softmax, score, scores, (query, key, value), (q, k, d, e))

    # ------------------------------------------------------------------------------------------ the two products

    def _result(self) -> tuple[Product, DeferredNormalisation | None]:
        """The product with the values, and what it is divided or multiplied by where the normalisation is deferred."""
        found = joined_products(self.r, _uncast(self.r.element(self.out, self.axes)))
        if isinstance(found, Opaque) and (product := product_of(self.r, found, "k")):
            return product, None
        if isinstance(found, Apply) and found.op in ("div", "mul"):
            left, right = map(_uncast, found.operands)
            if isinstance(left, Opaque) and (product := product_of(self.r, left, "k")):
                return product, DeferredNormalisation(found.op, right)
        raise Declined(NoScoreProduct(f"the result is {type(found).__name__.lower()} {getattr(found, 'op', '')}".strip()))

    def _probabilities_and_values(self, product: Product) -> tuple[Side, Side]:
        """Which side holds the normalised scores: the one whose coordinates reach a softmax or an exp, or where there is none
        a product that is not a value by itself."""
        for side, other in (product.sides, product.sides[::-1]):
            found = self.r.element(*side)
            if _normalised(found) if self.softmax else _made_of_products(found):
                return side, other
        raise Declined(NotSoftmax("neither factor is normalised" if self.softmax else "neither factor is made of a product"))

    def _row_and_feature(self, probs: Side, values: Side, k: sympy.Symbol) -> tuple[sympy.Symbol, sympy.Symbol]:
        """The query index is read by the probabilities alone, the value feature by the values alone."""
        p_axes, v_axes = _free(probs[1]), _free(values[1])
        rows = [x for x in self.axes if x in p_axes - v_axes]
        features = [x for x in self.axes if x in v_axes - p_axes]
        if not features and self.shape[-1] == 1:
            features = [x for x in self.axes[-1:] if x not in rows]
        if not features:
            raise Declined(UnsupportedShape("the values have no feature dimension"))
        for x in features:
            self._fix(x, self.out)
        if len(features) > 1:
            self._check_together(features)
            raise _SeveralFeatures([self.axes.index(x) for x in sorted(features, key=lambda x: -_step(x, values[1]))])
        if not rows:
            rows = [x for x in reversed(self.axes) if self.r.space.sizes[x] == 1 and x not in features][:1]
        if not rows:
            raise Declined(UnsupportedShape("there is no query dimension"))
        return rows[-1], features[0]

    def _check_together(self, features: Sequence[sympy.Symbol]) -> None:
        count = math.prod(int(self.r.space.sizes[x]) for x in features)
        if count > _FEATURES:
            raise Declined(
                UnsupportedShape(f"one row of weights has {count} features of values, in {len(features)} dimensions")
            )

    # ------------------------------------------------------------------------------------------------- the score

    def _score(
        self, softmax: Softmax, q: sympy.Symbol, k: sympy.Symbol
    ) -> tuple[Expr, tuple[Value, ...], Load, Load, sympy.Symbol]:
        joined = joined_scores(self.r, softmax.score, q, k)
        raw = softmax.score if joined is None else joined.score
        opaque, others = _last_first(summed_into(raw)), list[Product]()
        for candidate in opaque:
            one = joined is not None and candidate is joined.marker
            product = joined.product if joined is not None and one else product_of(self.r, candidate, "d")
            if product is None:
                continue
            sides = self._query_and_key(product, q, k)
            if sides is None:
                others.append(product)
                continue
            self._fix(product.over, *(value for value, _ in product.sides))
            self.r.inner.add(product.over)
            query, key = (self._operand(*side) for side in sides)
            score = expr.substitute(raw, {candidate: Score(candidate.dtype)})
            batch = {x.name for x in self.axes if x not in self.r.inner and self.r.space.sizes[x] != 1}
            score = hoist_lookups(self.r, self._with_addend(score, candidate), {q.name, k.name}, batch)
            score = self._loaded(score)
            scores = joined.of if joined is not None and one else (product.value,)
            logits = (score, *map(self._loaded, softmax.extra_logits))
            check_statistics(self.r, logits, self._loaded(softmax.weight), scores, q, k)
            return score, scores, query, key, product.over
        for product in others:
            check_before(self.r, product, k)
        raise Declined(NoScoreProduct(", ".join(sorted({o.name for o in opaque})) or "the scores are loaded"))

    def _with_addend(self, score: Expr, candidate: Opaque) -> Expr:
        """baddbmm(input, a, b, beta, alpha) is beta * input + alpha * (a @ b)."""
        v = candidate.value
        if candidate.name not in ("baddbmm", "addmm"):
            return score
        coords = tuple(self.r.index(c) for c in candidate.coords)
        alpha, beta = v.kwargs.get("alpha", 1), v.kwargs.get("beta", 1)
        out: Expr = Score(v.dtype)
        if alpha != 1:
            out = apply("mul", out, const(alpha, v.dtype), dtype=v.dtype)
        if beta != 0:
            addend = pointwise.read(self.r, v.args[0], coords, v.dtype)
            addend = addend if beta == 1 else apply("mul", const(beta, v.dtype), addend, dtype=v.dtype)
            out = apply("add", addend, out, dtype=v.dtype)
        return expr.substitute(score, {Score(v.dtype): out})

    def _fix(self, x: sympy.Symbol, *values: Value) -> None:
        """Kernels are made for one head dimension: a symbolic one, as under dynamic=True, is guarded on; but not for any two
        products without a softmax, which may be no attention."""
        size = self.r.space.sizes[x]
        for n in (n for v in values for n in v.shape if self.softmax and not size.is_Integer and as_index(n) == size):
            int(n)
            raise _Specialised
        if not size.is_Integer:
            raise Declined(UnsupportedShape(f"a feature dimension of size {size}"))

    def _query_and_key(self, product: Product, q: sympy.Symbol, k: sympy.Symbol) -> tuple[Side, Side] | None:
        """The sides in the order query, key if one is read at row q and the other at key k, and nowhere else."""
        one_row, one_key = (self.r.space.sizes[x] == 1 for x in (q, k))
        for a, b in (product.sides, product.sides[::-1]):
            rows, keys = _free(a[1]), _free(b[1])
            if k not in rows and q not in keys and (k in keys or one_key) and (q in rows or one_row):
                return a, b
        return None

    def _operand(self, value: Value, coords: tuple[IndexExpr, ...]) -> Load:
        """The tensor behind views: an operand of a product is loaded, never computed again for each tile."""
        for found in (_uncast(self.r.through_views(value, coords)), self.r.load(value, coords)):
            if isinstance(found, Load) and self._linear(found):
                return found
        raise Declined(NotLinear(f"an operand of shape {tuple(value.shape)}"))

    def _linear(self, load: Load) -> bool:
        at = [self.r.index(c) for c in load.coords]
        return not any(isinstance(n, (Load, Opaque)) for c in load.coords for n in expr.walk(c)) and all(
            (parts := linear(c, x)) is not None and parts[0].is_Integer for c in at for x in self.r.inner
        )

    def _loaded(self, score: Expr) -> Expr:
        """Every product and reduction that is not the score itself is computed by the graph, and loaded."""

        def rule(n: Expr) -> Expr | None:
            return self.r.load(n.value, tuple(self.r.index(c) for c in n.coords)) if isinstance(n, Opaque) else None

        return expr.rewrite(score, rule)

    # -------------------------------------------------------------------------------------------------- assembly

    def _assemble(
        self,
        softmax: Softmax,
        score: Expr,
        scores: tuple[Value, ...],
        loads: Sequence[Load],
        axes: tuple[sympy.Symbol, sympy.Symbol, sympy.Symbol, sympy.Symbol],
    ) -> Lifted:
        q, k, d, e = axes
        space = self.r.space
        batch = [x for x in self.axes if x not in (q, e)]
        names = {x.name: f"b{i}" for i, x in enumerate(batch)} | {q.name: "q", k.name: "k", d.name: "d", e.name: "e"}
        sizes = [space.sizes[x] for x in (*batch, q, k)]
        weights = with_scaled_choices(self._loaded(softmax.weight))
        roots = [*loads, score, weights, *map(self._loaded, softmax.extra_logits)]
        symbols = _named_sizes(sizes, len(batch))
        others = [s for s in expr.symbols(*roots) if s not in symbols]
        symbols |= {s: f"n{i}" for i, s in enumerate(others)}  # torch numbers its symbols anew with each recompile
        renamed, used = expr.renumbered(roots, names, symbols)
        query, key, value = (_supported(x) for x in renamed[:3])
        score, weight, *extra_logits = renamed[3:]
        if drawn_in(score, *extra_logits):
            raise Declined(RandomNumbers("a part of the scores"))
        _check_numbers(renamed[3:])
        leaves = tuple(self.r.leaves[i] for i in used)
        extra = tuple(symbols[s] for s in others)
        spec = AttentionSpec(
            batch=len(batch), qk_dim=int(space.sizes[d]), v_dim=int(space.sizes[e]),
            operands=tuple(Operand(len(v.shape), v.dtype) for v in leaves),
            query=query, key=key, value=value, score=_as_float(score), mask=None, extra_logits=tuple(extra_logits),
            weight=weight, empty_row="zero" if softmax.safe else "nan", out_dtype=self.out.dtype,
            out_order=tuple(range(len(batch) + 2)), extra=extra, normalisation=softmax.normalisation,
        )  # fmt: skip
        if softmax.rounded and (low := _low_number(spec)) is not None:
            raise Declined(NotSoftmax(f"the logarithm of a number of keys is rounded away beside a score of {low:g}"))
        order = [*batch, q, e]
        out_dims = tuple(order.index(x) for x in self.axes)
        all_sizes = (*sizes, *(self.r.symbols[s] for s in others))
        return Lifted(spec, leaves, all_sizes, out_dims, scores, Read(self.r, softmax, tuple(batch), q, k))


def _step(x: sympy.Symbol, coords: Sequence[IndexExpr]) -> int:
    """How far x moves the coordinate that it is in."""
    steps = [parts[0] for c in coords if x in c.free_symbols and (parts := linear(c, x)) is not None]
    return max((abs(int(step)) for step in steps if step.is_Integer), default=0)


def _named_sizes(sizes: Sequence[IndexExpr], batch: int) -> dict[str, str]:
    """torch's size symbols that are exactly one of the spec's own: "s0" → "q_len"."""
    names = [*(f"B{i}" for i in range(batch)), "q_len", "kv_len"]
    found: dict[str, str] = {}
    for n, name in zip(sizes, names, strict=True):
        if n.is_Symbol:
            found.setdefault(n.name, name)
    return found


def _supported(operand: Expr) -> Load:
    if not isinstance(operand, Load) or operand.dtype not in SUPPORTED:
        raise Declined(UnsupportedType(f"an operand is {operand.dtype}"))
    return operand


def _low_number(spec: AttentionSpec) -> float | None:
    """What all scores of a row may be that no key is left to: a fill that is finite, or a number as low that is in a score."""
    hidden = separate(spec.score, spec.batch)
    if hidden is not None and hidden.fill > -math.inf:
        return hidden.fill
    score = spec.score if hidden is None else hidden.visible
    numbers = [float(n.value) for n in expr.walk(score) if isinstance(n, Const) and n.dtype in expr.FLOATS]
    return min((x for x in numbers if -math.inf < x <= REPLACED), default=None)


def _check_numbers(roots: Sequence[Expr]) -> None:
    """Kernels compute halves in float32, and take numbers below the smallest normal one for zero. C++ knows no wrapping."""
    for n in expr.walk(*roots):
        if isinstance(n, Const) and n.dtype in expr.FLOATS:
            smallest = torch.finfo(torch.float64 if n.dtype == "float64" else torch.float32).tiny
            if 0 < abs(n.value) < smallest:
                raise Declined(UnsupportedType(f"the number {n.value:g} is no normal one"))
        if isinstance(n, Apply) and n.op in POLYNOMIAL and may_wrap(n, n.dtype):
            raise Declined(IntegersWrap(f"{to_text(n)} as {n.dtype}"))


def _last_first(products: list[Opaque]) -> list[Opaque]:
    """Those first on which fewer of the others depend: what is added to the score has to be there before it."""
    if len(products) < 2:
        return products
    origins = [p.value.origin for p in products]
    behind = {p: sum(o in reached_from(p.value.origin) for o in origins) for p in products}
    return sorted(products, key=behind.__getitem__)


def _as_float(score: Expr) -> Expr:
    return score if score.dtype in expr.FLOATS else apply("cast", score, dtype="float32")


def _uncast(e: Expr) -> Expr:
    while isinstance(e, Apply) and e.op == "cast" and e.dtype in expr.FLOATS:
        e = e.operands[0]
    return e


def _normalised(e: Expr) -> bool:
    return any(
        (isinstance(n, Opaque) and "softmax" in n.name) or (isinstance(n, Apply) and n.op == "exp") for n in expr.walk(e)
    )


def _made_of_products(e: Expr) -> bool:
    return not isinstance(_uncast(e), Opaque) and any(isinstance(n, Opaque) and n.name in PRODUCTS for n in expr.walk(e))


def _free(coords: Sequence[IndexExpr]) -> set[sympy.Symbol]:
    return set().union(*(c.free_symbols for c in coords)) if coords else set()
