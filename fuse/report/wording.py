"""Scores and masks in the user's terms: ``q - k < 4096 and document[q] == document[k]``.

For reading only. Casts between numbers are left out, negations are carried out, and comparisons of integers are solved: what
is compared with k stands beside it, or the distance beside a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fuse.ir.expr import COMPARISONS, INTS, Apply, Const, Expr, Load, apply, axes, const, index, walk
from fuse.ir.operators import CALL, OPERATORS
from fuse.ir.text import to_text

_NEGATED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt", "eq": "eq", "ne": "ne"}
_K = index("k")


def score_text(score: Expr, names: Mapping[int, str]) -> str:
    """A score or any other formula on one line."""
    return Words(names)(score)


def mask_text(predicate: Expr, names: Mapping[int, str]) -> str:
    """A predicate as one chain of conditions; coordinates of the batch are left out where there is one choice of them."""
    return Words(names, hidden(predicate))(predicate)


def members(predicate: Expr, chain: str) -> list[Expr]:
    """What all must hold ("and"), or one of which must ("or"), solved, without repetitions."""
    return list(dict.fromkeys(_members(_read(predicate), chain)))


@dataclass(frozen=True)
class Words:
    """Expressions as text; what writes them in another way has other words for the parts.

    hidden  operands of which only the coordinates that depend on q or k are written
    """

    names: Mapping[int, str]
    hidden: frozenset[int] = field(default_factory=frozenset)

    def __call__(self, n: Expr) -> str:
        return self.text(_read(n))

    def inside(self, n: Expr, level: int, right: bool = False) -> str:
        """The text of an operand of something that binds as ``level`` does."""
        n = _read(n)
        own = OPERATORS[n.op].binds if isinstance(n, Apply) else CALL
        text = self.text(n)
        return self.enclosed(text) if own < level or (own == level and right) else text

    def text(self, n: Expr) -> str:
        """Of what has been read."""
        if isinstance(n, Load):
            name = self.names.get(n.operand, f"operand{n.operand}")
            coords = [c for c in n.coords if n.operand not in self.hidden or axes(c) & {"q", "k"}]
            return self.element(name, [self(_place(c)) for c in coords])
        if not isinstance(n, Apply):
            return self.leaf(n)
        level = OPERATORS[n.op].binds
        if OPERATORS[n.op].sign and len(n.operands) == 2:
            a, b = n.operands
            compared = n.op in COMPARISONS
            left = self.inside(a, level, compared)
            right = self.inside(b, level, compared or n.op not in ("add", "and", "or"))
            return self.between(n, left, right)
        if OPERATORS[n.op].sign:
            return self.before(n, self.inside(n.operands[0], level))
        return self.call(n, [self(a) for a in n.operands])

    def leaf(self, n: Expr) -> str:
        return to_text(n)

    def element(self, name: str, coords: Sequence[str]) -> str:
        return f"{name}[{', '.join(coords)}]" if coords else name

    def enclosed(self, text: str) -> str:
        return f"({text})"

    def between(self, n: Apply, left: str, right: str) -> str:
        return f"{left} {OPERATORS[n.op].sign} {right}"

    def before(self, n: Apply, operand: str) -> str:
        return OPERATORS[n.op].sign + operand

    def call(self, n: Apply, operands: Sequence[str]) -> str:
        return f"{n.dtype if n.op == 'cast' else n.op}({', '.join(operands)})"


def _read(n: Expr) -> Expr:
    """n as it is written: without casts and sums that change no number that a reader would think of, conditions solved."""
    while isinstance(n, Apply) and n.op == "cast" and (n.dtype not in INTS or n.operands[0].dtype in INTS):
        n = n.operands[0]
    if isinstance(n, Apply) and n.op == "add" and isinstance(n.operands[1], Const) and n.operands[1].value == 0:
        return _read(n.operands[0])
    return _solved(_carried_out(n)) if n.dtype == "bool" else n


def _place(n: Expr) -> Expr:
    """A coordinate without what counts a negative one from the end: where(x < 0, x + size, x) is written x, as in PyTorch."""
    if isinstance(n, Apply) and n.op == "where":
        _, wrapped, plain = n.operands
        if isinstance(wrapped, Apply) and wrapped.op == "add" and wrapped.operands[0] is plain:
            return plain
    return n


def hidden(predicate: Expr) -> frozenset[int]:
    """Operands of which the coordinates of the batch are the same wherever they are read."""
    batch: dict[int, set[tuple[Expr, ...]]] = {}
    for n in walk(predicate):
        if isinstance(n, Load):
            batch.setdefault(n.operand, set()).add(tuple(c for c in n.coords if not axes(c) & {"q", "k"}))
    return frozenset(operand for operand, found in batch.items() if len(found) == 1)


# ----------------------------------------------------------------------------------------------------------- conditions


def _carried_out(e: Expr) -> Expr:
    """``not`` moved down to where it can be read: not (a and k <= q) is not a or k > q."""
    if not (isinstance(e, Apply) and e.op == "not" and isinstance(e.operands[0], Apply)):
        return e
    inner = e.operands[0]
    if inner.op == "not":
        return _carried_out(inner.operands[0])
    if inner.op in ("and", "or") and inner.dtype == "bool":
        negated = (_carried_out(apply("not", x, dtype="bool")) for x in inner.operands)
        return apply("or" if inner.op == "and" else "and", *negated, dtype="bool")
    if inner.op in ("eq", "ne") or (inner.op in _NEGATED and inner.operands[0].dtype in INTS):  # no order among NaN
        return Apply("bool", _NEGATED[inner.op], inner.operands)
    return e


def _solved(e: Expr) -> Expr:
    """A chain without repeated members; a comparison of integers with one side for k, or for the distance."""
    if not isinstance(e, Apply):
        return e
    if e.op in ("and", "or"):
        out, *rest = dict.fromkeys(_members(e, e.op))
        for member in rest:
            out = Apply("bool", e.op, (out, member))
        return out
    if e.op not in COMPARISONS or any(a.dtype not in INTS for a in e.operands):
        return e
    terms: dict[Expr, int] = {}
    _collect(e.operands[0], 1, terms)
    _collect(e.operands[1], -1, terms)
    number = terms.pop(const(1), 0)
    return _comparison(e.op, {t: c for t, c in terms.items() if c}, number)


def _members(e: Expr, chain: str) -> list[Expr]:
    e = _carried_out(e)
    if isinstance(e, Apply) and e.op == chain:
        return [m for x in e.operands for m in _members(x, chain)]
    return [_solved(e)]


def _collect(e: Expr, factor: int, terms: dict[Expr, int]) -> None:
    """Adds ``factor`` * e to ``terms``: term → coefficient, the number 1 among them."""
    if isinstance(e, Const):
        terms[const(1)] = terms.get(const(1), 0) + factor * int(e.value)
    elif isinstance(e, Apply) and e.op in ("add", "sub"):
        _collect(e.operands[0], factor, terms)
        _collect(e.operands[1], factor if e.op == "add" else -factor, terms)
    elif isinstance(e, Apply) and e.op == "neg":
        _collect(e.operands[0], -factor, terms)
    elif isinstance(e, Apply) and e.op == "cast" and e.operands[0].dtype in INTS:
        _collect(e.operands[0], factor, terms)
    elif isinstance(e, Apply) and e.op == "mul" and any(isinstance(a, Const) for a in e.operands):
        number, other = e.operands if isinstance(e.operands[0], Const) else e.operands[::-1]
        assert isinstance(number, Const)
        _collect(other, factor * int(number.value), terms)
    else:
        terms[e] = terms.get(e, 0) + factor


def _comparison(op: str, terms: dict[Expr, int], number: int) -> Expr:
    """The sum of ``terms`` and ``number``, compared with 0, as people write it."""
    op, number = {("lt", -1): ("le", 0), ("le", 1): ("lt", 0), ("gt", 1): ("ge", 0), ("ge", -1): ("gt", 0)}.get(
        (op, number), (op, number)
    )
    of_k = terms.get(_K, 0)
    distance = sorted(terms.values()) == [-1, 1] and number != 0
    if (distance and number > 0) or (not distance and (of_k < 0 or (of_k == 0 and sum(terms.values()) < 0))):
        op, number, terms = _MIRRORED[op], -number, {t: -c for t, c in terms.items()}
    if distance or len(terms) < 2:
        return Apply("bool", op, (_sum(terms, 0), const(-number)))
    if _K in terms:
        rest = {t: -c for t, c in terms.items() if t is not _K}
        return Apply("bool", op, (_sum({_K: terms[_K]}, 0), _sum(rest, -number)))
    left, right = ({t: c * sign for t, c in terms.items() if c * sign > 0} for sign in (1, -1))
    return Apply("bool", op, (_sum(left, max(number, 0)), _sum(right, max(-number, 0))))


def _sum(terms: Mapping[Expr, int], number: int) -> Expr:
    """Positive terms first."""
    out: Expr | None = None
    for term, c in sorted([*terms.items(), *([(const(1), number)] if number else [])], key=lambda x: x[1] < 0):
        size = (
            const(abs(c)) if isinstance(term, Const) else term if abs(c) == 1 else Apply("int64", "mul", (const(abs(c)), term))
        )
        if out is None:
            out = size if c > 0 else Apply("int64", "neg", (size,))
        else:
            out = Apply("int64", "add" if c > 0 else "sub", (out, size))
    return const(0) if out is None else out
