"""Softmax in any spelling: which scores are normalised over the keys, and what happens to the probabilities after. And what
multiplies values without one: scores, or these divided by their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import sympy

from fuse.ir import expr
from fuse.ir.expr import Apply, Expr, Prob, apply, const
from fuse.ir.index import IndexExpr
from fuse.passes.read.elements import Opaque, Reader, dims
from fuse.passes.read.trace import Value
from fuse.report.reasons import Declined, NotSoftmax, WeightNotLinear, WrongDimension

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
        return _by_exp(r, weights, _uncast(factor.operands[0]), k)
    return _with_gate(r, _recognise(r, weights, k), factor, k)


def unnormalised(r: Reader, weights: Expr, deferred: DeferredNormalisation | None, k: sympy.Symbol) -> Softmax:
    """``weights`` is what multiplies the values, and holds no softmax. Raises Declined where rows are scaled by something else
    than their sum."""
    if deferred is not None:
        if deferred.op == "div" and _reduces(r, deferred.factor, _uncast(weights), k, ("sum",)):
            return _of_scores(weights, Prob(weights.dtype), "sum")
        raise Declined(NotSoftmax("the result is scaled by something else"))
    for quotient in (n for n in expr.walk(weights) if isinstance(n, Apply) and n.op in ("div", "mul") and _divides(n)):
        score, total = _divides(quotient) or (quotient, quotient)
        if not _reduces(r, total, score, k, ("sum",)):
            raise Declined(NotSoftmax("scores are divided by more than their sum"))
        weight = expr.substitute(weights, {quotient: Prob(quotient.dtype)})
        _check_linear(weight)
        return _of_scores(score, weight, "sum")
    return _of_scores(weights, Prob(weights.dtype), "none")


def _of_scores(score: Expr, weight: Expr, normalisation: str) -> Softmax:
    return Softmax(score, (), weight, safe=False, normalisation=normalisation)


def _with_gate(r: Reader, softmax: Softmax, gate: Expr, k: sympy.Symbol) -> Softmax:
    """sigmoid(logsumexp(s) - z) times softmax(s) is the softmax in which a logit z takes part."""
    difference = _uncast(gate.operands[0]) if isinstance(gate, Apply) and gate.op == "sigmoid" else None
    if isinstance(difference, Apply) and difference.op == "sub":
        lse, z = difference.operands
        if not softmax.extra_logits and _reduces(r, _uncast(lse), softmax.score, k, ("logsumexp",)):
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
    left, right = map(_uncast, n.operands)
    if n.op == "mul":
        if not (isinstance(right, Apply) and right.op == "reciprocal"):
            return None
        right = _uncast(right.operands[0])
    has_sum = any(isinstance(x, Opaque) and x.name == "sum" for x in expr.walk(right))
    return (left, right) if has_sum else None


# ------------------------------------------------------------------------------------------------ softmax by its name


def _by_name(r: Reader, weights: Expr, named: list[Opaque], k: sympy.Symbol) -> Softmax:
    if len(named) > 1:
        raise Declined(NotSoftmax("several softmaxes in one product"))
    node = named[0]
    dim = node.value.args[1] % len(node.coords)
    coords = tuple(r.index(c) for c in node.coords)
    if r.space.sizes[k] == 1 and coords[dim] == 0:
        coords = (*coords[:dim], k, *coords[dim + 1 :])
    for i, c in enumerate(coords):
        if (k in c.free_symbols) != (i == dim):
            raise Declined(WrongDimension(f"dimension {dim} of {tuple(node.value.shape)}"))
    source = node.value.args[0]
    pieces = _pieces(r, source, coords, dim, k)
    score, *extra = _without_maximum(r, source, [r.element(source, at) for at in pieces], pieces, dim, k)
    probability: Expr = node
    if node.name == "_log_softmax":
        found = [n for n in expr.walk(weights) if isinstance(n, Apply) and n.op == "exp" and _uncast(n.operands[0]) is node]
        if not found:
            raise Declined(NotSoftmax("log_softmax without exp"))
        probability = found[0]
    softmax_dtype = probability.dtype
    return _finish(_cast(score, softmax_dtype), tuple(_cast(x, softmax_dtype) for x in extra), weights, probability,
                   node.name == "_safe_softmax")  # fmt: skip


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


def _without_maximum(
    r: Reader, source: Value, found: list[Expr], pieces: list[tuple[IndexExpr, ...]], dim: int, k: sympy.Symbol
) -> list[Expr]:
    """softmax(x - max(x)) is softmax(x): the maximum that a model subtracts itself, over the same entries, is dropped."""
    if len(found) == 1:
        return [_shift_dropped(r, found[0], k)]
    stripped = []
    for e, at in zip(found, pieces, strict=True):
        x = _minus_maximum(r, e, at[dim], k)
        if x is None:
            return found
        stripped.append(x)
    return stripped


def _shift_dropped(r: Reader, e: Expr, k: sympy.Symbol) -> Expr:
    """e without the row maxima that are subtracted inside it, where only sums and factors free of k lie around them."""
    if not isinstance(e, Apply):
        return e
    if (x := _minus_maximum(r, e, k, k)) is not None:
        return x
    operands = list(e.operands)
    if e.op in ("cast", "add", "sub") or (e.op in ("mul", "div") and k.name not in expr.axes(operands[1])):
        operands[0] = _shift_dropped(r, operands[0], k)
    if e.op == "add" or (e.op == "mul" and k.name not in expr.axes(operands[0])):
        operands[1] = _shift_dropped(r, operands[1], k)
    return e.with_args(tuple(operands))


def _minus_maximum(r: Reader, e: Expr, at: IndexExpr, k: sympy.Symbol) -> Expr | None:
    e = _uncast(e)
    if not (isinstance(e, Apply) and e.op == "sub"):
        return None
    x, m = e.operands
    return x if _reduces(r, _uncast(m), x, at, ("amax", "max")) else None


def _reduces(r: Reader, m: Expr, x: Expr, at: IndexExpr, names: tuple[str, ...]) -> bool:
    """Is m the reduction, along one dimension, of the very tensor whose element at ``at`` is x?"""
    m = _uncast(r.behind(m)) if "max" in names else _uncast(m)  # a maximum may be detached, a normaliser may not
    if not (isinstance(m, Opaque) and m.name in names and m.value.output == 0):
        return False
    inner = reduced_element(r, m, at)
    return inner is not None and _uncast(inner) is _uncast(x)


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
    inner = _uncast(inner)
    if not (isinstance(inner, Apply) and inner.op == "exp"):
        raise Declined(NotSoftmax("the sum is not over exp"))
    if _size_of_sum(row_sum) != r.space.sizes[k]:
        raise Declined(WrongDimension("the sum runs over another number of entries than the product"))
    if all(_uncast(n) is not inner for n in expr.walk(numerator)):
        raise Declined(NotSoftmax("numerator and denominator differ"))
    shift, score = _shifted(r, inner.operands[0], k)
    extra = _extra_logits(_uncast(denominator), row_sum, shift)
    weight = expr.substitute(numerator, {inner: Prob(inner.dtype)})
    _check_linear(weight)
    return Softmax(score, extra, weight, safe=False)


def _size_of_sum(row_sum: Opaque) -> IndexExpr:
    source, axes = row_sum.value.args[:2]
    return dims(source)[(axes if isinstance(axes, int) else axes[0])]


def _shifted(r: Reader, e: Expr, k: sympy.Symbol) -> tuple[Expr | None, Expr]:
    """(m, s) of s - m where m is the maximum of s over the keys; (None, e) else."""
    e = _uncast(e)
    if isinstance(e, Apply) and e.op == "sub":
        x, m = e.operands
        if _reduces(r, _uncast(m), x, k, ("amax", "max")):
            return m, x
    return None, e


def _extra_logits(denominator: Expr, row_sum: Opaque, shift: Expr | None) -> tuple[Expr, ...]:
    """Beside the sum, the denominator may hold exp(z - m): a logit z without a value."""
    if denominator is row_sum:
        return ()
    if isinstance(denominator, Apply) and denominator.op == "add":
        parts = [_uncast(p) for p in denominator.operands]
        if row_sum in parts:
            rest = parts[1 - parts.index(row_sum)]
            if (z := _logit(rest, shift)) is not None:
                return (z,)
    raise Declined(NotSoftmax(f"the denominator is {denominator.__class__.__name__.lower()} of more than the sum"))


def _logit(e: Expr, shift: Expr | None) -> Expr | None:
    """z with e == exp(z - shift)."""
    if shift is None:
        if isinstance(e, expr.Const) and e.value == 1:
            return const(0.0, e.dtype)
        return e.operands[0] if isinstance(e, Apply) and e.op == "exp" else None
    if not (isinstance(e, Apply) and e.op == "exp"):
        return None
    x = _uncast(e.operands[0])
    if isinstance(x, Apply) and x.op == "neg" and _uncast(x.operands[0]) is _uncast(shift):
        return const(0.0, e.dtype)
    if isinstance(x, Apply) and x.op == "sub" and _uncast(x.operands[1]) is _uncast(shift):
        return x.operands[0]
    return None


def _by_logsumexp(r: Reader, weights: Expr, k: sympy.Symbol) -> Softmax:
    """exp(s - logsumexp(s))."""
    for n in expr.walk(weights):
        if not (isinstance(n, Apply) and n.op == "exp"):
            continue
        inner = _uncast(n.operands[0])
        if isinstance(inner, Apply) and inner.op == "sub":
            x, m = inner.operands
            if _reduces(r, _uncast(m), x, k, ("logsumexp",)):
                return replace(_finish(x, (), weights, n, False), rounded=True)
    raise Declined(NotSoftmax("exp without a sum over the keys"))


def empty_log_sum_exp(r: Reader, e: Expr, of: Softmax, k: sympy.Symbol) -> str | None:
    """Is e the logarithm of what ``of`` divides by: the sum of exp(score) over k, and of exp of each extra logit?

    By its name, or as log(sum(exp(s - m))) + m, m being the maximum. None where it is not, else what it is in a row without any
    score: "-inf", or by a maximum "nan".
    """
    e, wanted = _uncast(e), [of.score, *of.extra_logits]
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
    exponential = _uncast(inner)
    assert isinstance(exponential, Apply)  # see _by_exp
    shift = _shifted(r, exponential.operands[0], k)[0]
    if (m and _uncast(m)) is not (shift and _uncast(shift)) or not _all_same([found.score, *found.extra_logits], wanted):
        return None
    return "-inf" if m is None else "nan"


def _plus_maximum(e: Expr) -> tuple[Expr, Expr | None]:
    """(log, m) of log + m; (e, None) else."""
    if isinstance(e, Apply) and e.op == "add":
        for x, m in (e.operands, e.operands[::-1]):
            if isinstance(x := _uncast(x), Apply) and x.op == "log":
                return x, m
    return e, None


def _all_same(found: Sequence[Expr], wanted: Sequence[Expr]) -> bool:
    return len(found) == len(wanted) and all(_uncast(a) is _uncast(b) for a, b in zip(found, wanted, strict=True))


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


def _uncast(e: Expr) -> Expr:
    while isinstance(e, Apply) and e.op == "cast" and e.dtype in expr.FLOATS and e.operands[0].dtype in expr.FLOATS:
        e = e.operands[0]
    return e
