"""Every rule by which expressions and masks are rewritten is proved: by z3, or by trying all there is on a small grid.

z3 decides over bit vectors for integers and over IEEE floats of sixteen bits, with NaN, infinities and both zeros; what it
cannot decide is compared with PyTorch, or with the integers themselves, exhaustively. A rule without a proof fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sympy
import test_predicate
import z3
from problems import both, op
from proving import (
    HALVES,
    INTEGERS,
    NO,
    NUMBERS,
    YES,
    Instances,
    P,
    Q,
    R,
    agrees,
    free,
    grid,
    prove,
    same,
    solved,
    torch_value,
    whole,
)
from torch.utils._sympy.functions import FloorDiv

from fuse.ir import expr, index
from fuse.ir.expr import Apply, Expr, Load, const, symbol
from fuse.ir.index import Space, size_symbol, variable
from fuse.ir.operators import OPERATORS
from fuse.ir.rules import RULES, Rule
from fuse.passes import bounds, predicate


def _known_condition() -> Instances:
    for dtype in (*NUMBERS, "bool"):
        yield from (("where", (c, *free(dtype, 2)), dtype) for c in (YES, NO))


def _equal_operands() -> Instances:
    for dtype in (*NUMBERS, "bool"):
        (x,) = free(dtype, 1)
        yield "where", (P, x, x), dtype
        yield from ((name, (x, x), dtype) for name in (("and", "or") if dtype == "bool" else ("minimum", "maximum")))


def _choices_of_truth() -> Instances:
    for constant in (YES, NO):
        yield "where", (P, constant, Q), "bool"
        yield "where", (P, Q, constant), "bool"


def _known_truth() -> Instances:
    for name, constant in itertools.product(("and", "or", "xor"), (YES, NO)):
        yield name, (P, constant), "bool"
        yield name, (constant, P), "bool"


def _complement() -> Instances:
    for name in ("and", "or"):
        yield name, (P, op("not", P)), "bool"
        yield name, (op("not", P), P), "bool"


def _absorption() -> Instances:
    for dtype in ("bool", "int64", "int32", "uint8"):
        x, y = free(dtype, 2)
        for name, dual in (
            (("and", "or"), ("or", "and")) if dtype == "bool" else (("minimum", "maximum"), ("maximum", "minimum"))
        ):
            for inner in (Apply(dtype, dual, (x, y)), Apply(dtype, dual, (y, x))):
                yield name, (x, inner), dtype
                yield name, (inner, x), dtype


def _with_constant(name: str, value: float, dtypes: Sequence[str], orders: int = 2) -> Instances:
    for dtype in dtypes:
        (x,) = free(dtype, 1)
        args = (x, const(value, dtype))
        yield from ((name, order, dtype) for order in (args, args[::-1])[:orders])


BY_Z3: dict[str, Callable[[], Instances]] = {
    "known condition": _known_condition,
    "equal operands": _equal_operands,
    "choice of truth values": _choices_of_truth,
    "known truth value": _known_truth,
    "complement": _complement,
    "double negation": lambda: (("not", (Apply(d, "not", free(d, 1)),), d) for d in ("bool", "int32")),
    "zero addend": lambda: itertools.chain(_with_constant("add", 0, INTEGERS), _with_constant("add", -0.0, HALVES)),
    "zero subtrahend": lambda: itertools.chain(_with_constant("sub", 0, (*INTEGERS, *HALVES), orders=1)),
    "factor one": lambda: _with_constant("mul", 1, NUMBERS),
    "zero factor": lambda: _with_constant("mul", 0, INTEGERS),
    "absorption": _absorption,
}  # fmt: skip


def rule_named(name: str) -> Rule:
    return next(rule for rule in RULES if rule.name == name)


def _proved_by_z3(name: str) -> None:
    count = 0
    for operator, args, dtype in BY_Z3[name]():
        rule = rule_named(name)
        found = rule.rewrite(operator, tuple(args), dtype)
        assert operator in rule.ops and found is not None, (operator, args)
        same(Apply(dtype, operator, tuple(args)), found)
        count += 1
    assert count


UNSOUND = {
    "zero addend": [("add", free(d, 1)[0], const(0.0, d)) for d in HALVES],  # -0.0 + 0.0 is 0.0
    "zero subtrahend": [("sub", free(d, 1)[0], const(-0.0, d)) for d in HALVES],
    "zero factor": [("mul", free(d, 1)[0], const(0.0, d)) for d in HALVES],  # NaN, infinities, -0.0
    "absorption": [("maximum", free(d, 2)[0], Apply(d, "minimum", free(d, 2))) for d in HALVES],  # NaN
}


@pytest.mark.parametrize("name", UNSOUND)
def test_rules_are_not_used_where_they_would_be_wrong(name: str) -> None:
    for operator, *args in UNSOUND[name]:
        assert rule_named(name).rewrite(operator, tuple(args), args[0].dtype) is None


# ------------------------------------------------------------------------------------- rules on constants, against PyTorch

LOGIC_OPS = ("and", "or", "xor", "not")


def applications(operator: str) -> Iterator[Apply]:
    """``operator`` on all constants of the grids for which it is defined."""
    for dtype in expr.DTYPES:
        if (operator in LOGIC_OPS and dtype in expr.FLOATS) or (
            dtype == "bool" and operator in ("sub", "neg", "floordiv", "mod")
        ):
            continue
        of_truth = operator in (*expr.COMPARISONS, "isnan", "isinf")
        for args in itertools.product(grid(dtype), repeat=OPERATORS[operator].arity):
            yield Apply("bool" if of_truth else dtype, operator, args)


def _constant_operands() -> None:
    rule, folded = rule_named("constant operands"), 0
    for e in itertools.chain.from_iterable(map(applications, rule.ops)):
        if (found := rule.rewrite(e.op, e.operands, e.dtype)) is not None:
            agrees(e, found)
            folded += 1
    assert folded > 5000


def _constant_casts() -> None:
    rule = rule_named("constant cast")
    for source, target in itertools.product(expr.DTYPES, repeat=2):
        for value in grid(source):
            if (found := rule.rewrite("cast", (value,), target)) is not None:
                agrees(Apply(target, "cast", (value,)), found)
            else:
                assert source in expr.FLOATS and target in expr.INTS


def _functions_of_choices() -> None:
    rule, count = rule_named("function of a choice of constants"), 0
    condition = Load("bool", 0, ())
    for dtype, operator in itertools.product(("float16", "int64"), rule.ops):
        values = grid(dtype)[:: 3 if dtype == "float16" else 5]
        for a, b, c, d in itertools.product(values, values, values, values[:2]):
            nested = Apply(dtype, "where", (P, a, Apply(dtype, "where", (Q, b, d))))
            for choice in (Apply(dtype, "where", (condition, a, b)), nested):
                rest = () if operator == "cast" else (c,)
                out = "bfloat16" if operator == "cast" else "bool"
                if (found := rule.rewrite(operator, (choice, *rest), out)) is None:
                    continue
                count += 1
                for p, q in itertools.product((YES, NO), repeat=2):
                    table: dict[Expr, Expr] = {P: p, Q: q, condition: p}
                    e = Apply(out, operator, (expr.substitute(choice, table), *rest))
                    agrees(e, expr.substitute(found, table))
    assert count > 1000


def _casts_of_choices() -> None:
    rule, count = rule_named("cast of a choice"), 0
    for dtype, out in itertools.product(("float16", "float32", "int64"), ("bfloat16", "float32", "int32", "bool")):
        for a, b in itertools.product(grid(dtype), repeat=2):
            if (found := rule.rewrite("cast", (Apply(dtype, "where", (P, a, b)),), out)) is None:
                continue
            count += 1
            for p in (YES, NO):
                agrees(Apply(out, "cast", (Apply(dtype, "where", (p, a, b)),)), expr.substitute(found, {P: p}))
    assert count > 1000


def _cast_to_the_same_dtype() -> None:
    for dtype in expr.DTYPES:
        for x in grid(dtype):
            assert rule_named("cast to the same dtype").rewrite("cast", (x,), dtype) is x
            agrees(Apply(dtype, "cast", (x,)), x)


# ----------------------------------------------------------------------------------------------------- logic of bounds


def _integers() -> list[Expr]:
    return [symbol(name) for name in "xyz"]


def _proved_logic(rule: Callable[[Apply], Expr | None], instances: Sequence[Expr]) -> None:
    for e in instances:
        assert isinstance(e, Apply)
        found = rule(e)
        assert found is not None
        same(e, found)


def _negated_connectives() -> None:
    _proved_logic(bounds.NEGATIONS["negated connective"], [Apply("bool", "not", (op(c, P, Q),)) for c in ("and", "or")])


def _negated_comparisons() -> None:
    instances = [Apply("bool", "not", (Apply("bool", c, free(d, 2)),)) for d in INTEGERS for c in expr.COMPARISONS]
    _proved_logic(bounds.NEGATIONS["negated comparison"], instances)
    for dtype in HALVES:  # not x < y is not x >= y where one is NaN
        assert bounds.NEGATIONS["negated comparison"](Apply("bool", "not", (Apply("bool", "lt", free(dtype, 2)),))) is None


ORDER = ("lt", "le", "gt", "ge")


def _absolute_values() -> None:
    x, y, _ = _integers()
    distance = Apply("int64", "abs", (x,))
    instances = [Apply("bool", c, args) for c in ORDER for args in ((distance, y), (y, distance))]
    _proved_logic(bounds.DISTANCES["absolute value"], instances)


def _extrema() -> None:
    x, y, z = _integers()
    for name in ("minimum", "maximum"):
        inner = Apply("int64", name, (x, y))
        instances = [Apply("bool", c, args) for c in ORDER for args in ((inner, z), (z, inner))]
        _proved_logic(bounds.DISTANCES["maximum and minimum"], instances)


# ---------------------------------------------------------------------------------------- solutions for k, exhaustively

K, X = variable("k"), variable("x")
SMALL = range(-9, 10)


def _solution(solve: Callable[[Space, Any], tuple[bool, Any] | None], difference: Any) -> None:
    found = solve(Space(), sympy.expand(difference))
    assert found is not None
    f, g = (sympy.lambdify((K, X), e, modules=[{"FloorDiv": lambda a, b: a // b}]) for e in (difference, found[1]))
    for k, x in itertools.product(SMALL, SMALL):
        bound = g(k, x)
        assert (f(k, x) >= 0) == (k >= bound if found[0] else k < bound), (difference, k, x)


def _linear_in_key() -> None:
    for slope, rest in itertools.product((-5, -3, -2, -1, 1, 2, 3, 4), (X, 2 * X - 1, -3 * X + 4, FloorDiv(X, 3) + 1)):
        _solution(bounds.SOLUTIONS["linear in the key"], slope * K + rest)


def _linear_in_block() -> None:
    blocks = (FloorDiv(K + shift, n) for shift, n in itertools.product((-3, 0, 2, X), (sympy.Integer(2), sympy.Integer(5))))
    for block, slope, rest in itertools.product(blocks, (-3, -1, 1, 2), (X, FloorDiv(X, 4) - 2)):
        _solution(bounds.SOLUTIONS["linear in a block of keys"], slope * block + rest)


def _same_block() -> None:
    """For any size, negative ones included: k // n == x // n is lower <= k < upper, and neither decreases with x."""
    x, n = symbol("x"), symbol("n")
    found = bounds.same_block(x, n)
    assert found.lower is not None and found.upper is not None
    for size in (*range(-7, 0), *range(1, 8)):
        limits = []
        for at in range(-20, 21):
            low, high = (
                torch_value(expr.substitute(e, {x: const(at), n: const(size)})).item() for e in (found.lower, found.upper)
            )
            assert all((k // size == at // size) == (low <= k < high) for k in range(-30, 31))
            limits.append((low, high))
        assert limits == sorted(limits) and sorted(high for _, high in limits) == [high for _, high in limits]


def _held_integers() -> None:
    """For positions below 2^32, an integer held within FAR compares with them as it does itself, and no sum wraps."""
    data, position, shift = z3.Ints("data position shift")
    held = z3.If(data > bounds.FAR, bounds.FAR, z3.If(data < -bounds.FAR, -bounds.FAR, data))
    small = [z3.And(x > -(2**32), x < 2**32) for x in (position, shift)]
    prove(z3.Implies(z3.And(*small), (position < data + shift) == (position < held + shift)))
    prove(z3.Implies(z3.And(*small), (position < shift - data) == (position < shift - held)))


def _joined_bounds() -> None:
    """and, or of bounds: on every pair of small intervals, with and without a rest, at every k."""
    options = [None, const(1), const(3)]
    parts = [bounds.Bounds(a, b, r) for a in options for b in options for r in (None, P)]
    for a, b in itertools.product(parts, repeat=2):
        whole = Apply("bool", "or", (_claim(a, P), _claim(b, Q)))
        b = bounds.Bounds(b.lower, b.upper, b.residual and Q)
        met, either = bounds.conjunction([a, b]), bounds.disjunction([a, b], whole)
        prove(_meaning(met) == z3.And(_meaning(a), _meaning(b)))
        prove(_meaning(either) == z3.Or(_meaning(a), _meaning(b)))


def _claim(b: bounds.Bounds, residual: Expr) -> Expr:
    k = symbol("k")
    parts = [op("ge", k, b.lower)] if b.lower is not None else []
    parts += [op("lt", k, b.upper)] if b.upper is not None else []
    return both(YES, *parts, *([residual] if b.residual is not None else []))


def _meaning(b: bounds.Bounds) -> Any:
    return solved(both(_claim(bounds.Bounds(b.lower, b.upper), YES), b.residual if b.residual is not None else YES))


# ------------------------------------------------------------------------------------------- cases of a score's masks


def _expansion_by_truth() -> None:
    """f(c) is where(c, f(True), f(False)): what ``assume`` and the truth tables rest on."""
    f = z3.Function("f", z3.BoolSort(), z3.BitVecSort(8))
    c = z3.Bool("c")
    prove(f(c) == z3.If(c, f(z3.BoolVal(True)), f(z3.BoolVal(False))))
    for condition in (
        P,
        op("not", P),
        op("and", P, Q),
        op("or", P, Q),
        op("and", op("not", P), op("or", Q, R)),
        op("xor", P, Q),
    ):
        for value in (True, False):
            told = [solved(a) == solved(b) for a, b in predicate._implied(condition, value)]
            prove(z3.Implies(solved(condition) == z3.BoolVal(value), z3.And(*told)))


# ------------------------------------------------------------------------------------------------------- index algebra

N = range(1, 7)


def _divided(rule: str, terms: Sequence[Any]) -> None:
    """term == n * whole + rest, for all values of its variables."""
    x, s = variable("x"), size_symbol("s")
    fired = 0
    for term, n in itertools.product(terms, (*map(sympy.Integer, N), s)):
        if (found := index.DIVISIONS[rule](term, n)) is None:
            continue
        fired += 1
        for at, size in itertools.product(SMALL, N):
            values = {x: at, s: size}
            assert whole(term, values) == whole(n, values) * whole(found[0], values) + whole(found[1], values)
    assert fired > 3


def _index_terms() -> list[Any]:
    x, s = variable("x"), size_symbol("s")
    plain = [x, s, x * s, 6 * x, -4 * x * s, 12 * s, s * s * x]
    return [*map(sympy.Integer, (-7, -1, 0, 5, 12)), *plain, *(c * FloorDiv(x, m) for c in (-6, 1, 4, 6) for m in (2, 3, 5))]


# ------------------------------------------------------------------------------------------------------ nothing left out

PROOFS: dict[str, Callable[[], None]] = {
    **{name: (lambda name=name: _proved_by_z3(name)) for name in BY_Z3},  # type: ignore[misc]
    "cast to the same dtype": _cast_to_the_same_dtype,
    "function of a choice of constants": _functions_of_choices,
    "cast of a choice": _casts_of_choices,
    "constant operands": _constant_operands,
    "constant cast": _constant_casts,
    "negated connective": _negated_connectives,
    "negated comparison": _negated_comparisons,
    "absolute value": _absolute_values,
    "maximum and minimum": _extrema,
    "linear in the key": _linear_in_key,
    "linear in a block of keys": _linear_in_block,
    "multiple": lambda: _divided("multiple", _index_terms()),
    "multiple of a division": lambda: _divided("multiple of a division", _index_terms()),
    "number": lambda: _divided("number", _index_terms()),
    "same block": _same_block,
    "held integers": _held_integers,
    "joined bounds": _joined_bounds,
    "a truth value masks": _expansion_by_truth,
    "either value of a truth": _expansion_by_truth,
    "a shared tensor masks": test_predicate.test_a_separated_score_is_what_it_was_on_every_value,
}


def test_every_rule_has_a_proof() -> None:
    tables = (bounds.NEGATIONS, bounds.DISTANCES, bounds.SOLUTIONS, predicate.CASES, index.DIVISIONS)
    assert {rule.name for rule in RULES}.union(*tables) <= PROOFS.keys()
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("name", [name for name in PROOFS if name != "a shared tensor masks"])
def test_proof(name: str) -> None:
    PROOFS[name]()
