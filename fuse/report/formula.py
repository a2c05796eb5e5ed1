"""What a site computes, typeset: a line for each part of its spec, as MathML and as plain text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuse.ir.expr import Apply, Const, Expr, Index, Prob, Score, Symbol, operands
from fuse.ir.operators import OPERATORS
from fuse.ir.spec import AttentionSpec
from fuse.report.wording import Words, hidden, members

_SIGNS = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "*": "·", "-": "−", "%": "mod"}
_SPOKEN = {"and", "or", "not", "mod"}
_BRACKETS = {"abs": "||", "floor": "⌊⌋", "ceil": "⌈⌉"}
_ROLES = ("query", "key", "value")
_LETTERS = {"query": "Q", "key": "K", "value": "V"}


@dataclass(frozen=True)
class Line:
    """``part`` of what is computed is "product", "score", "softmax" or "result"; ``mathml`` is a whole element."""

    part: str
    mathml: str
    text: str


@dataclass(frozen=True)
class Tensor:
    """What plays a ``role``, by a letter in the formula or by its own name, and which element of it is read."""

    role: str
    letter: str
    element: str
    dtype: str


def lines(spec: AttentionSpec, names: Mapping[int, str]) -> tuple[Line, ...]:
    """The score of query and key, what the softmax is of, the softmax or what is in its place, and the sum over the values.

    names  operand number → what the user's code calls the tensor
    """
    words, marks = Words(names), MathML(names)
    mask = spec.mask
    product = _equals(_S, _row(_sigma("d"), _of("Q", "q", "d"), _of("K", "k", "d")))
    found = [Line("product", _math(product), "score = sum over d of Q[q, d] * K[k, d]")]
    if mask is None:
        found.append(Line("score", _math(_equals(_A, marks(spec.score))), f"a = {words(spec.score)}"))
    else:
        seen, seen_text = _stacked(mask.predicate, names), Words(names, hidden(mask.predicate))(mask.predicate)
        least, finite = marks(Const("float64", mask.fill)), math.isfinite(mask.fill) and spec.softmax
        typeset = _cases([(marks(mask.visible), seen)], _row(_text("at most "), least) if finite else least)
        text = f"a = {words(mask.visible)} where {seen_text}, else {'at most ' * finite}{mask.fill:g}"
        found.append(Line("score", _math(_equals(_A, typeset)), text))
    joined = "".join(f", with {words(x)} in the sum" for x in spec.extra_logits)
    beside = [_row(_text(" with "), marks(x), _text(" in the sum")) for x in spec.extra_logits]
    softmax = _row(_under("softmax", "k"), '<mspace width="0.3em"/>', _A, *beside)
    normalised = {
        "softmax": (softmax, f"softmax over k of a{joined}"),
        "sum": (f"<mfrac>{_A}{_row(_sigma('k'), _A)}</mfrac>", "a / sum over k of a"),
        "none": (_A, "a"),
    }
    typeset, text = normalised[spec.normalisation]
    found.append(Line("softmax", _math(_equals(_P, typeset)), f"prob = {text}"))
    weight = _row(marks.inside(spec.weight, OPERATORS["mul"].binds), _of("V", "k", "e"))
    text = f"out = sum over k of {words.inside(spec.weight, OPERATORS['mul'].binds)} * V[k, e]"
    found.append(Line("result", _math(_equals(_of("out", "q", "e"), _row(_sigma("k"), weight))), text))
    return tuple(found)


def tensors(spec: AttentionSpec, names: Mapping[int, str]) -> tuple[Tensor, ...]:
    """Query, key and value, then what else the kernel reads, once each."""
    words = Words(names)
    roles = [(role, getattr(spec, role)) for role in _ROLES]
    found = [Tensor(role, _LETTERS[role], words(load), load.dtype) for role, load in roles]
    known = {load.operand for _, load in roles}
    readers = [(part, operands(*roots)) for part, roots in _readers(spec).items()]
    for operand, what in enumerate(spec.operands):
        if operand not in known:
            role = f"read by {', '.join(part for part, read in readers if operand in read)}"
            found.append(Tensor(role, "", names.get(operand, f"operand{operand}"), what.dtype))
    return tuple(found)


def _readers(spec: AttentionSpec) -> dict[str, list[Expr]]:
    """The parts of the formula that may read more than query, key and value."""
    mask = spec.mask
    found = {"score": [spec.score if mask is None else mask.visible], "softmax": [*spec.extra_logits], "weight": [spec.weight]}
    if mask is not None:
        found |= {
            "mask": [mask.predicate],
            "choice of tiles": [e for e in (mask.lower, mask.upper, mask.tiles) if e is not None],
        }
    return found


def _stacked(predicate: Expr, names: Mapping[int, str]) -> str:
    """Conditions below each other, since a line of all may be longer than a page is wide."""
    marks, joined, parts = MathML(names, hidden(predicate)), "and", members(predicate, "and")
    if len(parts) == 1:
        joined, parts = "or", members(predicate, "or")
    rows = [_row(*[_text(f"{joined} ")] * (i > 0), marks(part)) for i, part in enumerate(parts)]
    return rows[0] if len(rows) == 1 else f"<mtable>{''.join(f'<mtr>{_left(row)}</mtr>' for row in rows)}</mtable>"


# ----------------------------------------------------------------------------------------------------------- expressions


class MathML(Words):
    """Expressions as presentation MathML; names are the user's, and escaped."""

    def text(self, n: Expr) -> str:
        if isinstance(n, Apply):
            if n.op in ("div", "floordiv"):
                quotient = f"<mfrac>{self(n.operands[0])}{self(n.operands[1])}</mfrac>"
                return quotient if n.op == "div" else _row(_operator("⌊"), quotient, _operator("⌋"))
            if n.op == "pow":
                return f"<msup>{self.inside(n.operands[0], OPERATORS['pow'].binds, True)}{self(n.operands[1])}</msup>"
            if n.op == "where":
                return _cases([(self(n.operands[1]), self(n.operands[0]))], self(n.operands[2]))
        return super().text(n)

    def leaf(self, n: Expr) -> str:
        if isinstance(n, Const):
            return _constant(n.value)
        if isinstance(n, (Index, Symbol)):
            return _name(n.axis if isinstance(n, Index) else n.name)
        return _S if isinstance(n, Score) else _P if isinstance(n, Prob) else _text(str(n))

    def element(self, name: str, coords: Sequence[str]) -> str:
        return f"<msub>{_identifier(name)}{_row(*_separated(coords))}</msub>" if coords else _identifier(name)

    def enclosed(self, text: str) -> str:
        return _row(_operator("("), text, _operator(")"))

    def between(self, n: Apply, left: str, right: str) -> str:
        return _row(left, _sign(OPERATORS[n.op].sign), right)

    def before(self, n: Apply, operand: str) -> str:
        return _row(_sign(OPERATORS[n.op].sign.strip()), operand)

    def call(self, n: Apply, operands: Sequence[str]) -> str:
        if n.op == "sqrt":
            return f"<msqrt>{operands[0]}</msqrt>"
        if n.op in _BRACKETS:
            brackets = _BRACKETS[n.op]
            return _row(_operator(brackets[0]), operands[0], _operator(brackets[1]))
        name = n.dtype if n.op == "cast" else n.op
        return _row(_identifier(name), _operator("("), *_separated(operands), _operator(")"))


def _constant(value: float | int | bool) -> str:
    if isinstance(value, float) and math.isinf(value):
        return _row(*[_operator("−")] * (value < 0), _operator("∞"))
    digits, _, exponent = (f"{value:g}" if isinstance(value, float) else str(value)).partition("e")
    sign, number = [_operator("−")] * digits.startswith("-"), f"<mn>{digits.removeprefix('-')}</mn>"
    if not exponent:
        return _row(*sign, number)
    power = f"<msup><mn>10</mn>{_constant(int(exponent))}</msup>"
    return _row(*sign, number, _operator("×"), power)


# ------------------------------------------------------------------------------------------------------------- elements


def _math(inside: str) -> str:
    return f'<math displaystyle="true">{inside}</math>'


def _row(*inside: str) -> str:
    return inside[0] if len(inside) == 1 else f"<mrow>{''.join(inside)}</mrow>"


def _identifier(name: str) -> str:
    return f"<mi>{html.escape(name)}</mi>"


def _name(name: str) -> str:
    """b0 with its number below."""
    numbered = re.fullmatch(r"([A-Za-z])(\d+)", name)
    return f"<msub><mi>{numbered[1]}</mi><mn>{numbered[2]}</mn></msub>" if numbered else _identifier(name)


def _operator(sign: str) -> str:
    return f"<mo>{html.escape(sign)}</mo>"


def _text(words: str) -> str:
    return f"<mtext>{html.escape(words).replace(' ', '&#160;')}</mtext>"


def _sign(sign: str) -> str:
    shown = _SIGNS.get(sign, sign)
    return _text(f" {shown} ") if shown in _SPOKEN else _operator(shown)


def _separated(items: Sequence[str]) -> list[str]:
    return [x for item in items for x in (_operator(","), item)][1:]


def _of(name: str, *at: str) -> str:
    return f"<msub>{_identifier(name)}{_row(*map(_identifier, at))}</msub>"


def _under(name: str, below: str) -> str:
    return f"<munder>{_identifier(name)}{_identifier(below)}</munder>"


def _sigma(over: str) -> str:
    return f"<munder><mo>∑</mo>{_identifier(over)}</munder>"


def _equals(left: str, right: str) -> str:
    return _row(left, _operator("="), right)


def _left(cell: str) -> str:
    """A cell of a table, which would else be centred."""
    return f'<mtd style="text-align:left;padding:.15em .4em .15em 0">{cell}</mtd>'


def _cases(rows: Sequence[tuple[str, str]], otherwise: str) -> str:
    """A brace before values, each with its condition."""
    told = [(value, _row(_text("where "), condition)) for value, condition in rows] + [(otherwise, _text("otherwise"))]
    cells = "".join(f"<mtr>{_left(value)}{_left(condition)}</mtr>" for value, condition in told)
    return _row('<mo stretchy="true">{</mo>', f"<mtable>{cells}</mtable>")


_S, _A, _P = (_of(letter, "q", "k") for letter in "sap")
