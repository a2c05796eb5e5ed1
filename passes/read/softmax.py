"""Softmax in any spelling: which scores are normalised over the keys, and what happens to the probabilities after. And what
multiplies values without one: scores, or these divided by their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import sympy

from fuse.ir import expr
from fuse.ir.expr import Apply, Expr, Prob, apply, const
from fuse.ir.index import IndexExpr
from fuse.passes.read.elements import PRODUCTS, Opaque, Reader, dims, summed_into, uncast
from fuse.passes.read.mixed import check_behind
from fuse.passes.read.shifts import subtracts, without_shift
from fuse.passes.read.trace import Value
from fuse.report.reasons import Declined, NotSoftmax, Reason, SeveralSoftmaxes, WeightNotLinear, WrongDimension

_SINK_LIMIT = 8  # extra positions of the softmax that have no key


@dataclass(frozen=True)
class Softmax:
    """weight(p) with p = softmax over k of score, ``extra_logits`` joining.

    safe           rows without a score give zeros
    rounded        probabilities are exp(score - logsumexp), of which a row of equal and very low scores has one each
    normalisation  as fuse.ir.spec has it, where it is none
    """

    score: Expr
    extra_logits: tuple[Expr, ...]
    weight: Expr
    safe: bool
    rounded: bool = False
    normalisation: str = "softmax"


@dataclass(frozen=True)
class DeferredNormalisation:
    """What the product with the values is multiplied ("mul") or divided ("div") by, in the place of the probabilities."""

    op: str
    factor: Expr


def recognise(r: Reader, weights: Expr, deferred: DeferredNormalisation | None, k: sympy.Symbol) -> Softmax:
    """``weights`` is what multiplies the values. Raises Declined where that, with ``deferred``, is no softmax over k."""
    if deferred is None:
        return _recognise(r, weights, k)
    factor = deferred.factor
    if deferred.op == "div":
        return _by_exp(r, weights, factor, k)
    if isinstance(factor, Apply) and factor.op == "reciprocal":
        return _by_exp(r, weights, uncast(factor.operands[0]), k)
    return _with_gate(r, _recognise(r, weights, k), factor, k)


def unnormalised(r: Reader, weights: Expr, deferred: DeferredNormalisation | None, k: sympy.Symbol) -> Softmax:
    """``weights`` is what multiplies the values, and holds no softmax. Raises Declined where rows are scaled by something else
    than their sum."""
    if deferred is not None:
        if deferred.op == "div" and _reduces(r, deferred.factor, uncast(weights), k, "sum"):
            return _of_scores(weights, Prob(weights.dtype), "sum")
        raise Declined(NotSoftmax("the result is scaled by something else"))
    for quotient in (n for n in expr.walk(weights) if isinstance(n, Apply) and n.op in ("div", "mul") and _divides(n)):
        score, total = _divides(quotient) or (quotient, quotient)
        if not _reduces(r, total, score, k, "sum"):
            raise Declined(NotSoftmax("scores are divided by more than their sum"))
        weight = expr.substitute(weights, {quotient: Prob(quotient.dtype)})
        _check_linear(weight)
        return _of_scores(score, weight, "sum")
    return _of_scores(weights, Prob(weights.dtype), "none")


def _of_scores(score: Expr, weight: Expr, normalisation: str) -> Softmax:
    return Softmax(score, (), weight, safe=False, normalisation=normalisation)


def _with_gate(r: Reader, softmax: Softmax, gate: Expr, k: sympy.Symbol) -> Softmax:
    """sigmoid(logsumexp(s) - z) times softmax(s) is the softmax in which a logit z takes part."""
    difference = uncast(gate.operands[0]) if isinstance(gate, Apply) and gate.op == "sigmoid" else None
    if isinstance(difference, Apply) and difference.op == "sub":
        lse, z = difference.operands
        if not softmax.extra_logits and _reduces(r, lse, softmax.score, k, "logsumexp"):
            return replace(softmax, extra_logits=(_cast(z, softmax.score.dtype),))
    raise Declined(NotSoftmax("the result is scaled by something else"))


def _recognise(r: Reader, weights: Expr, k: sympy.Symbol) -> Softmax:
    named = [n for n in expr.walk(weights) if isinstance(n, Opaque) and "softmax" in n.name]
    if named:
        return _by_name(r, weights, named, k)
    quotients = [n for n in expr.walk(weights) if isinstance(n, Apply) and n.op in ("div", "mul") and _divides(n)]
    for quotient in quotients:
        numerator, denominator = _divides(quotient) or (quotient, quotient)
        softmax = _by_exp(r, numerator, denominator, k)
        weight = expr.substitute(weights, {quotient: softmax.weight})
        _check_linear(weight)
        return replace(softmax, weight=weight)
    return _by_logsumexp(r, weights, k)


def _divides(n: Apply) -> tuple[Expr, Expr] | None:
    """(numerator, denominator) of a quotient by a sum."""
    left, right = map(uncast, n.operands)
    if n.op == "mul":
        if not (isinstance(right, Apply) and right.op == "reciprocal"):
            return None
        right = uncast(right.operands[0])
    has_sum = any(isinstance(x, Opaque) and x.name == "sum" for x in expr.walk(right))
    return (left, right) if has_sum else None


# ------------------------------------------------------------------------------------------------ softmax by its name


def _by_name(r: Reader, weights: Expr, named: list[Opaque], k: sympy.Symbol) -> Softmax:
    if len(named) > 1:
        raise Declined(_of_several(r, weights, named, k))
    node = named[0]
    dim = node.value.args[1] % len(node.coords)
    coords = tuple(r.index(c) for c in node.coords)
    if r.space.sizes[k] == 1 and coords[dim] == 0:
        coords = (*coords[:dim], k, *coords[dim + 1 :])
    for i, c in enumerate(coords):
        if (k in c.free_symbols) != (i == dim):
            if coords[dim] in r.space.sizes:
                check_behind(r, r.element(node.value.args[0], coords), k, coords[dim])
            raise Declined(WrongDimension(f"dimension {dim} of {tuple(node.value.shape)}"))
    source = node.value.args[0]
    pieces = _pieces(r, source, coords, dim, k)
    score, *extra = without_shift(r, [r.element(source, at) for at in pieces], k)
    probability: Expr = node
    if node.name == "_log_softmax":
        found = [n for n in expr.walk(weights) if isinstance(n, Apply) and n.op == "exp" and uncast(n.operands[0]) is node]
        if not found:
            raise Declined(NotSoftmax("log_softmax without exp"))
        probability = found[0]
    softmax_dtype = probability.dtype
    return _finish(_cast(score, softmax_dtype), tuple(_cast(x, softmax_dtype) for x in extra), weights, probability,
                   node.name == "_safe_softmax")  # fmt: skip


def _of_several(r: Reader, weights: Expr, named: list[Opaque], k: sympy.Symbol) -> Reason:
    """Attention where some of them are taken of products that differ by key."""
    for node in named:
        score = r.element(node.value.args[0], tuple(r.index(c) for c in node.coords))
        if any(n.name in PRODUCTS and k.name in expr.axes(n) for n in summed_into(score)):
            return SeveralSoftmaxes(f"{len(named)}, below {getattr(weights, 'op', 'a product')}")
    return NotSoftmax("several softmaxes in one product")


def _cast(e: Expr, dtype: str) -> Expr:
    """softmax(x, dtype=d) converts x first; the conversion of the result is no part of the score."""
    widened = ("float32", "float64")
    return apply("cast", e, dtype=dtype) if e.dtype not in widened and dtype in widened else e


def _pieces(r: Reader, source: Value, coords: tuple[IndexExpr, ...], dim: int, k: sympy.Symbol) -> list[tuple[IndexExpr, ...]]:
    """Where the softmax reads: at the keys first, then at the few positions that no value belongs to."""
    entries, keys = dims(source)[dim], r.space.sizes[k]
    begin = sympy.expand(coords[dim] - k)
    surplus = sympy.expand(entries - keys)
    if not (begin.is_Integer and surplus.is_Integer and 0 <= begin <= surplus <= _SINK_LIMIT):
        raise Declined(WrongDimension(f"the softmax runs over {entries} entries, the product over {keys}"))
    before = [sympy.Integer(i) for i in range(int(begin))]
    after = [sympy.expand(keys + begin + i) for i in range(int(surplus - begin))]
    return [coords, *((*coords[:dim], at, *coords[dim + 1 :]) for at in before + after)]


def _reduces(r: Reader, m: Expr, x: Expr, at: IndexExpr, name: str) -> bool:
    """Is m the reduction, along one dimension, of the very tensor whose element at ``at`` is x?"""
    m = uncast(m)
    if not (isinstance(m, Opaque) and m.name == name):
        return False
    inner = reduced_element(r, m, at)
    return inner is not None and uncast(inner) is uncast(x)


def reduced_element(r: Reader, m: Opaque, at: IndexExpr) -> Expr | None:
    """The element at position ``at`` of the one dimension that the reduction m runs over."""
    source: Value = m.value.args[0]
    axes = m.value.args[1] if len(m.value.args) > 1 else None
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, (list, tuple)) or len(axes) != 1:
        return None
    rank = len(source.shape)
    axis = axes[0] % rank
    coords = [r.index(c) for c in m.coords]
    keepdim = len(coords) == rank
    return r.element(source, (*coords[:axis], at, *coords[axis + keepdim :]))


# ------------------------------------------------------------------------------------- exp, sum and logsumexp by hand


def _by_exp(r: Reader, numerator: Expr, denominator: Expr, k: sympy.Symbol) -> Softmax:
    """exp(s) / (sum of exp(s) + a), s with or without its maximum subtracted; a is the exp of an extra logit."""
    sums = [n for n in expr.walk(denominator) if isinstance(n, Opaque) and n.name == "sum"]
    if len(sums) != 1:
        raise Declined(NotSoftmax("the denominator is no single sum"))
    row_sum = sums[0]
    inner = reduced_element(r, row_sum, k)
    if inner is None:
        raise Declined(NotSoftmax("the sum runs over several dimensions"))
    inner = uncast(inner)
    if not (isinstance(inner, Apply) and inner.op == "exp"):
        raise Declined(NotSoftmax("the sum is not over exp"))
    if _size_of_sum(row_sum) != r.space.sizes[k]:
        raise Declined(WrongDimension("the sum runs over another number of entries than the product"))
    if all(uncast(n) is not inner for n in expr.walk(numerator)):
        raise Declined(NotSoftmax("numerator and denominator differ"))
    score, *extra = without_shift(r, [inner.operands[0], *_added_logits(uncast(denominator), row_sum)], k)
    weight = expr.substitute(numerator, {inner: Prob(inner.dtype)})
    _check_linear(weight)
    return Softmax(score, tuple(extra), weight, safe=False)


def _size_of_sum(row_sum: Opaque) -> IndexExpr:
    source, axes = row_sum.value.args[:2]
    return dims(source)[(axes if isinstance(axes, int) else axes[0])]


def _added_logits(denominator: Expr, row_sum: Opaque) -> list[Expr]:
    """Beside the sum, the denominator may hold exp(z), or a number, which is that of its logarithm: logits without a value."""
    if denominator is row_sum:
        return []
    if isinstance(denominator, Apply) and denominator.op == "add":
        parts = [uncast(p) for p in denominator.operands]
        here = [p for p in parts if row_sum in expr.walk(p)]
        if len(here) == 1:
            return [*_added_logits(here[0], row_sum), _logit(parts[1 - parts.index(here[0])])]
    raise Declined(NotSoftmax(f"the denominator is {denominator.__class__.__name__.lower()} of more than the sum"))


def _logit(e: Expr) -> Expr:
    """z with e == exp(z)."""
    if isinstance(e, expr.Const) and e.value > 0:
        return const(math.log(e.value), e.dtype)
    if isinstance(e, Apply) and e.op == "exp":
        return e.operands[0]
    raise Declined(NotSoftmax("what is added to the sum is neither a positive number nor an exponential"))


def _by_logsumexp(r: Reader, weights: Expr, k: sympy.Symbol) -> Softmax:
    """exp(s - logsumexp(s))."""
    for n in expr.walk(weights):
        if not (isinstance(n, Apply) and n.op == "exp"):
            continue
        inner = uncast(n.operands[0])
        if isinstance(inner, Apply) and inner.op == "sub":
            x, m = inner.operands
            if _reduces(r, m, x, k, "logsumexp"):
                return replace(_finish(x, (), weights, n, False), rounded=True)
    raise Declined(NotSoftmax("exp without a sum over the keys"))


def empty_log_sum_exp(r: Reader, e: Expr, of: Softmax, k: sympy.Symbol) -> str | None:
    """Is e the logarithm of what ``of`` divides by: the sum of exp(score) over k, and of exp of each extra logit?

    By its name, or as log(sum(exp(s - m))) + m, m being the maximum. None where it is not, else what it is in a row without any
    score: "-inf", or by a maximum "nan".
    """
    e, wanted = uncast(e), [of.score, *of.extra_logits]
    if isinstance(e, Opaque) and e.name == "logsumexp":
        return "-inf" if any(_all_same(found, wanted) for found in _joined(r, e, k)) else None
    total, m = _plus_maximum(e)
    sums = [n for n in expr.walk(total) if isinstance(n, Opaque) and n.name == "sum"]
    inner = reduced_element(r, sums[0], k) if len(sums) == 1 else None
    if inner is None or not (isinstance(total, Apply) and total.op == "log"):
        return None
    try:
        found = _by_exp(r, inner, total.operands[0], k)
    except Declined:
        return None
    exponential = uncast(inner)
    assert isinstance(exponential, Apply)  # see _by_exp
    if not subtracts(exponential.operands[0], found.score, m, k) or not _all_same([found.score, *found.extra_logits], wanted):
        return None
    if m is not None and not any(_reduces(r, r.behind(uncast(m)), found.score, k, name) for name in ("amax", "max")):
        return None
    return "-inf" if m is None else "nan"


def _plus_maximum(e: Expr) -> tuple[Expr, Expr | None]:
    """(log, m) of log + m; (e, None) else."""
    if isinstance(e, Apply) and e.op == "add":
        for x, m in (e.operands, e.operands[::-1]):
            if isinstance(x := uncast(x), Apply) and x.op == "log":
                return x, m
    return e, None


def _all_same(found: Sequence[Expr], wanted: Sequence[Expr]) -> bool:
    return len(found) == len(wanted) and all(uncast(a) is uncast(b) for a, b in zip(found, wanted, strict=True))


def _joined(r: Reader, e: Opaque, k: sympy.Symbol) -> Iterator[list[Expr]]:
    """What a logsumexp runs over, once for each place that the keys may have in it: the score, then the entries beside them."""
    (axis, *more), keys = e.value.args[1], r.space.sizes[k]
    surplus = sympy.expand(dims(e.value.args[0])[axis] - keys)
    if more or not (surplus.is_Integer and 0 <= surplus <= _SINK_LIMIT):
        return
    for begin in range(int(surplus) + 1):
        beside = [*range(begin), *(sympy.expand(keys + i) for i in range(begin, int(surplus)))]
        places = [sympy.expand(k + begin), *map(sympy.sympify, beside)]
        yield [x for at in places if (x := reduced_element(r, e, at)) is not None]


# ------------------------------------------------------------------------------------------------ after the softmax


def _finish(score: Expr, extra: tuple[Expr, ...], weights: Expr, normalised: Expr, safe: bool) -> Softmax:
    weight = expr.substitute(weights, {normalised: Prob(normalised.dtype)})
    if any(isinstance(n, Opaque) and "softmax" in n.name for n in expr.walk(weight)):
        raise Declined(NotSoftmax("the softmax is also used in another form"))
    _check_linear(weight)
    return Softmax(score, extra, weight, safe)


def _check_linear(weight: Expr) -> None:
    """weight must be linear in Prob and zero where it is: then it may be applied before the normalisation."""
    degree: dict[Expr, str] = {}
    for n in expr.walk(weight):
        degree[n] = _degree(n, degree)
    if degree[weight] not in ("linear", "zero"):
        culprit = next((n.op for n in expr.walk(weight) if isinstance(n, Apply) and degree[n] == "other"), "a constant")
        raise Declined(WeightNotLinear(culprit))


def _degree(n: Expr, known: dict[Expr, str]) -> str:
    """How n depends on Prob: "free", "zero" (free and 0), "linear" (homogeneous), or "other"."""
    if isinstance(n, Prob):
        return "linear"
    if isinstance(n, expr.Const) and n.value == 0:
        return "zero"
    kinds = [known[a] for a in n.args]
    if all(x in ("free", "zero") for x in kinds):
        return "free"
    if isinstance(n, Apply):
        if n.op == "neg" or (n.op == "cast" and n.dtype in expr.FLOATS):
            return kinds[0]
        if n.op == "mul" and "other" not in kinds:
            return "other" if kinds == ["linear", "linear"] else "linear"
        if n.op == "div" and kinds[0] == "linear" and kinds[1] == "free":
            return "linear"
        if n.op in ("add", "sub") and all(x in ("linear", "zero") for x in kinds):
            return "linear"
        if n.op == "where" and kinds[0] == "free" and all(x in ("linear", "zero") for x in kinds[1:]):
            return "linear"
    return "other"
