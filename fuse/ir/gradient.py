"""Derivatives of score programs, and what the backward pass of a spec computes.

With dO the gradient of the result (FlashAttention-2, Dao 2023, section 3.1.2, for any ``score`` and ``weight``):

    P   = exp(score - lse)                                     lse = log(sum_k exp(score) + sum exp(extra_logits))
    W   = weight(P) = c P                                      c free of P: ``weight`` is linear, and zero where P is
    dV  = sum over q of W dO                                   for each k, e
    dW  = sum over e of dO V                                   for each q, k
    dP  = c dW
    dS  = P (dP - delta)                                       delta = sum_k P dP
    dX  = dS * d score / d Score                               for each q, k: X = sum over d of Q K, the raw score
    dQ  = sum over k of dX K,   dK = sum over q of dX Q
    dz  = -exp(z - lse) delta                                  for each extra logit z, which has no value

``delta`` is rowsum(dO * out) whatever ``weight`` is: out = sum_k W V, so that
rowsum(dO * out) = sum_k W (sum_e dO V) = sum_k c P dW = sum_k P dP.

Without a softmax, P and dS differ, and what is kept of a row in the place of lse is called ``total``:

    "sum"   P = score / total,   total = sum_k score     dS = (dP - delta) / total
    "none"  P = score,           total = 1, not kept     dS = dP

A tensor that is loaded in ``score`` gets dS * d score / d Load, in ``weight`` dW * d weight / d Load, in an extra logit
dz * d z / d Load; each at the coordinates that were loaded. What several loads, entries or batch indices add to one
element is summed: query, key, value and the loads may all be of one tensor, and grouped queries share a key.

``lse`` has the shape of ``out`` without its features. A row of ``empty_row`` "zero" without a finite score has an lse of
+inf, so that P is 0, and one of "nan" an lse of -inf, so that P is NaN. In a row that is masked entirely by a finite fill,
lse is about as large as the fill and has lost log(kv_len): such a row, lse <= fill + 256, needs max and sum again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from fuse.ir import expr
from fuse.ir.expr import FLOATS, Apply, Const, Expr, Index, Load, Prob, Score, apply, const, op
from fuse.ir.operators import OPERATORS
from fuse.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Term:
    """What one load in an expression adds to the gradient of its operand, at ``load.coords``.

    root     the expression that reads it: "score", "weight", "extra_logits.0", …
    factor   d root / d load, by which the gradient of root (dS, dW, dz) is multiplied
    visible  the same for ``mask.visible``, where that holds; None: the spec has no mask, or root is not the score
    """

    root: str
    load: Load
    factor: Expr
    visible: Expr | None

    @property
    def axes(self) -> frozenset[str]:
        """The indices that the element depends on; over the others the gradient is summed."""
        return frozenset().union(*(expr.axes(c) for c in self.load.coords))

    @property
    def distinct(self) -> bool:
        """Whether different values of ``axes`` are sure to be different elements: each is a coordinate by itself."""
        return self.axes == {c.axis for c in self.load.coords if isinstance(c, Index)}


@dataclass(frozen=True)
class Gradient:
    """What the backward pass of ``spec`` computes, for the operands that are ``wanted``.

    score    d score / d Score, over batch, q and k; may read Score
    visible  d mask.visible / d Score, what the former is where the predicate holds; None: there is no mask
    weight   d weight / d Prob, over batch, q and k: c in the module's text
    terms    the loads of wanted operands outside of query, key and value
    """

    spec: AttentionSpec
    wanted: tuple[bool, ...]
    score: Expr
    visible: Expr | None
    weight: Expr
    terms: tuple[Term, ...]

    @property
    def query(self) -> bool:
        return self.wanted[self.spec.query.operand]

    @property
    def key(self) -> bool:
        return self.wanted[self.spec.key.operand]

    @property
    def value(self) -> bool:
        return self.wanted[self.spec.value.operand]


@cache
def gradient(spec: AttentionSpec, wanted: tuple[bool, ...]) -> Gradient:
    """``wanted`` has one entry for each operand; those of integers cannot be."""
    mask = spec.mask
    score, visible = _of_leaf(spec.score, Score), None if mask is None else _of_leaf(mask.visible, Score)
    return Gradient(spec, wanted, score, visible, _of_leaf(spec.weight, Prob), tuple(_terms(spec, wanted)))


@cache
def differentiable(spec: AttentionSpec, values: bool = True) -> tuple[bool, ...]:
    """For each operand whether a gradient reaches it: what only decides a condition has none. ``values``: those of the result
    do, not of the weights alone."""
    floats = tuple(o.dtype in FLOATS for o in spec.operands)
    reached = {spec.query.operand, spec.key.operand} | ({spec.value.operand} if values else set())
    reached |= {term.load.operand for term in gradient(spec, floats).terms}
    return tuple(i in reached for i in range(len(floats)))


def _of_leaf(root: Expr, kind: type[Expr]) -> Expr:
    """The derivative by the one leaf of ``kind``, zero where there is none."""
    leaves = [n for n in expr.walk(root) if isinstance(n, kind)]
    return derivative(root, leaves[0]) if leaves else const(0.0, root.dtype)


def _terms(spec: AttentionSpec, wanted: Sequence[bool]) -> list[Term]:
    """One for each load of the score or of ``mask.visible``: what is in one of them only adds nothing in the other."""
    terms = []
    for name, root in spec.roots().items():
        if name not in ("score", "weight") and not name.startswith("extra_logits"):
            continue
        free = spec.mask.visible if spec.mask and name == "score" else None
        for load in expr.walk(root, *([] if free is None else [free])):
            if not isinstance(load, Load) or load.dtype not in FLOATS or not wanted[load.operand]:
                continue
            if any(tangent(x, load) is not None for x in (root, free) if x is not None):
                terms.append(Term(name, load, derivative(root, load), free and derivative(free, load)))
    return terms


# ------------------------------------------------------------------------------------------------------ derivatives


def derivative(root: Expr, leaf: Expr) -> Expr:
    """d root / d leaf in root's dtype, for a leaf that is a Score, a Prob or a Load; all other leaves are constants.

    Where a function has no derivative it is what PyTorch's autograd gives: 0 for abs at 0, one half each for equal
    operands of minimum and maximum, all of it for a value that equals a constant bound, as of clamp, 0 for pow(0, y) by y
    and for what is rounded, compared or cast to integers.
    """
    found = tangent(root, leaf)
    return const(0.0, root.dtype) if found is None else found


def tangent(root: Expr, leaf: Expr) -> Expr | None:
    """``derivative``, but None where it is zero whatever the operands hold."""
    known: dict[Expr, Expr | None] = {}
    for n in expr.walk(root):
        if n is leaf:
            known[n] = const(1.0, n.dtype)
        elif isinstance(n, Apply) and n.dtype in FLOATS:
            known[n] = _chain(n, [known[a] for a in n.operands])
        else:
            known[n] = None
    return known[root]


def _chain(n: Apply, tangents: list[Expr | None]) -> Expr | None:
    """Only what is chosen is multiplied: an infinite derivative beside it must not turn into NaN."""
    if all(t is None for t in tangents):
        return None
    if n.op == "cast":
        return tangents[0] and apply("cast", tangents[0], dtype=n.dtype)
    if n.op in _CHOICES:
        return _CHOICES[n.op](n, [const(0.0, n.dtype) if t is None else t for t in tangents])
    total: Expr | None = None
    for i, t in enumerate(tangents):
        partial = None if t is None else (OPERATORS[n.op].partials or ())[i](n)
        if t is not None and partial is not None:
            term = _mul(t, partial)
            total = term if total is None else op("add", total, term)
    return total


def _mul(a: Expr, b: Expr) -> Expr:
    for this, other in ((a, b), (b, a)):
        if isinstance(this, Const) and this.value == -1:
            return op("neg", other)
    return op("mul", a, b)


def _where(n: Apply, tangents: list[Expr]) -> Expr:
    return apply("where", n.operands[0], *tangents[1:], dtype=n.dtype)


def _extreme(n: Apply, tangents: list[Expr]) -> Expr:
    a, b = n.operands
    beyond = "gt" if n.op == "maximum" else "lt"
    for bound, value, t in ((a, b, tangents[1]), (b, a, tangents[0])):
        if isinstance(bound, Const):
            return apply("where", op(beyond, bound, value), const(0.0, n.dtype), t, dtype=n.dtype)
    mean = op("mul", op("add", *tangents), 0.5)
    other = apply("where", op("eq", a, b), mean, tangents[1], dtype=n.dtype)
    return apply("where", op(beyond, a, b), tangents[0], other, dtype=n.dtype)


_CHOICES: dict[str, Callable[[Apply, list[Expr]], Expr]] = {"where": _where, "minimum": _extreme, "maximum": _extreme}
