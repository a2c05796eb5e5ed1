"""Every rule by which expressions and masks are rewritten is proved: by z3, or by trying all there is on a small grid.

z3 decides over bit vectors for integers and over IEEE floats of sixteen bits, with NaN, infinities and both zeros; what it
cannot decide is compared with PyTorch, or with the integers themselves, exhaustively. A rule without a proof fails.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import sympy
import torch
import z3
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import both, cast, op, problem
from torch.utils._sympy.functions import FloorDiv, PythonMod

from fuse import expr, frame, index, reference
from fuse.expr import RULES, Apply, Const, Expr, Load, Rule, Score, const, symbol
from fuse.index import Space, size_symbol, variable
from fuse.passes import bounds, intervals, predicate
from fuse.passes.intervals import Range
from fuse.spec import Mask, verify

repeatable = settings(derandomize=True, deadline=None)

# ------------------------------------------------------------------------------------------------------ from Expr to z3

FLOAT_SORTS = {"float16": z3.Float16(), "bfloat16": z3.FPSort(8, 8)}
INT_BITS = {"int64": 64, "int32": 32, "uint8": 8}


def solved(e: Expr) -> Any:
    """``e`` in z3: loads, symbols and scores are free variables; integers are bit vectors, which wrap."""
    if isinstance(e, Const):
        if e.dtype == "bool":
            return z3.BoolVal(e.value)
        if e.dtype in FLOAT_SORTS:
            return z3.FPVal(e.value, FLOAT_SORTS[e.dtype])
        return z3.BitVecVal(int(e.value), INT_BITS[e.dtype])
    if not isinstance(e, Apply):
        name = f"{e.dtype} {e}"
        if e.dtype == "bool":
            return z3.Bool(name)
        return z3.FP(name, FLOAT_SORTS[e.dtype]) if e.dtype in FLOAT_SORTS else z3.BitVec(name, INT_BITS[e.dtype])
    return _operator(e, [solved(x) for x in e.operands])


def _operator(e: Apply, args: list[Any]) -> Any:
    if e.operands[-1].dtype in FLOAT_SORTS and e.op in _OF_FLOATS:
        return _OF_FLOATS[e.op](*args)
    return _OF_INTEGERS[e.op](*args)


def _below(op: str, signed: Callable[[Any, Any], Any], unsigned: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: unsigned(a, b) if a.size() == 8 else signed(a, b)


_lt = _below("lt", lambda a, b: a < b, z3.ULT)
_OF_INTEGERS: dict[str, Callable[..., Any]] = {
    "and": lambda a, b: z3.And(a, b) if z3.is_bool(a) else a & b, "or": lambda a, b: z3.Or(a, b) if z3.is_bool(a) else a | b,
    "xor": lambda a, b: z3.Xor(a, b) if z3.is_bool(a) else a ^ b, "not": lambda a: z3.Not(a) if z3.is_bool(a) else ~a,
    "where": z3.If, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "minimum": lambda a, b: z3.If(_lt(b, a), b, a), "maximum": lambda a, b: z3.If(_lt(a, b), b, a),
    "lt": _lt, "gt": lambda a, b: _lt(b, a), "le": lambda a, b: z3.Not(_lt(b, a)), "ge": lambda a, b: z3.Not(_lt(a, b)),
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "abs": lambda a: z3.If(a < 0, -a, a),
}  # fmt: skip
_NEAREST = z3.RNE()
_OF_FLOATS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: z3.fpAdd(_NEAREST, a, b), "sub": lambda a, b: z3.fpSub(_NEAREST, a, b),
    "mul": lambda a, b: z3.fpMul(_NEAREST, a, b), "lt": z3.fpLT, "le": z3.fpLEQ, "gt": z3.fpGT, "ge": z3.fpGEQ,
    "eq": z3.fpEQ, "ne": z3.fpNEQ,
    "minimum": lambda a, b: z3.If(z3.Or(z3.fpLT(a, b), z3.fpIsNaN(a)), a, b),
    "maximum": lambda a, b: z3.If(z3.Or(z3.fpGT(a, b), z3.fpIsNaN(a)), a, b),
}  # fmt: skip


def prove(claim: Any) -> None:
    """Fails with an example unless ``claim`` holds for all values of its variables."""
    solver = z3.Solver()
    solver.set("timeout", 20_000)
    solver.add(z3.Not(claim))
    outcome = solver.check()
    assert outcome == z3.unsat, f"{claim}: {solver.model() if outcome == z3.sat else outcome}"


def same(a: Expr, b: Expr) -> None:
    """Fails unless the two are equal bit for bit, whatever their leaves are. (z3 has one NaN, and two zeros.)"""
    assert a is not b and a.dtype == b.dtype
    prove(solved(a) == solved(b))


# --------------------------------------------------------------------------------------------- the rules of fuse.expr


@cache
def free(dtype: str, count: int) -> tuple[Expr, ...]:
    return tuple(Load(dtype, i, ()) for i in range(count))


P, Q, R = free("bool", 3)
YES, NO = const(True, "bool"), const(False, "bool")
NUMBERS = ("float16", "bfloat16", "int64", "int32", "uint8")
Instances = Iterator[tuple[str, Sequence[Expr], str]]


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


INTEGERS, HALVES = ("int64", "int32", "uint8"), ("float16", "bfloat16")
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

FLOAT_GRID = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    1.9,
    -2.5,
    3e4,
    65504.0,
    -7e4,
    -1e9,
    3.3e38,
    torch.finfo(torch.float32).min,
    math.inf,
    -math.inf,
    math.nan,
)
INT_GRID = (0, 1, -1, 2, 7, -8, 100, 127, -128, 200, 255, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))


def grid(dtype: str) -> list[Const]:
    if dtype == "bool":
        return [YES, NO]
    if dtype in expr.FLOATS:
        return [const(x, dtype) for x in FLOAT_GRID]
    limits = torch.iinfo(getattr(torch, dtype))
    return [const(x, dtype) for x in INT_GRID if limits.min <= x <= limits.max]


def torch_value(e: Expr) -> torch.Tensor:
    """A tree of constants as PyTorch computes it, on tensors of their dtypes."""
    if isinstance(e, Const):
        return torch.tensor(e.value, dtype=getattr(torch, e.dtype))
    assert isinstance(e, Apply)
    args = [torch_value(x) for x in e.operands]
    dtype: torch.dtype = getattr(torch, e.dtype)
    return args[0].to(dtype) if e.op == "cast" else frame.OPS[e.op](*args).to(dtype)


def agrees(e: Expr, found: Expr) -> None:
    expected, got = torch_value(e), torch_value(found)
    assert expected.dtype == got.dtype and repr(expected.item()) == repr(got.item()), (
        f"{e}: {got.item()}, not {expected.item()}"
    )


LOGIC_OPS = ("and", "or", "xor", "not")


def applications(operator: str) -> Iterator[Apply]:
    """``operator`` on all constants of the grids for which it is defined."""
    for dtype in expr.DTYPES:
        if (operator in LOGIC_OPS and dtype in expr.FLOATS) or (
            dtype == "bool" and operator in ("sub", "neg", "floordiv", "mod")
        ):
            continue
        of_truth = operator in (*expr.COMPARISONS, "isnan", "isinf")
        for args in itertools.product(grid(dtype), repeat=expr.ARITY[operator]):
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


def whole(e: Any, values: dict[Any, int]) -> int:
    return int(sympy.sympify(e).subs(values))


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


FLOAT_DTYPES = ("float16", "bfloat16", "float32")
DATA = (0.0, 1.0, 0.5, -3.0, -2.1e4, -65504.0, -2.1e28, -3.3e38, -math.inf)


def evaluated(e: Expr, leaves: dict[Expr, torch.Tensor]) -> torch.Tensor:
    """``e`` as eager PyTorch rounds it, on tensors for its leaves; Python numbers stay unrounded until they are used."""
    known: dict[Expr, torch.Tensor] = dict(leaves)
    for n in expr.walk(e):
        if n in known:
            continue
        if isinstance(n, Const):
            known[n] = torch.tensor(n.value, dtype=torch.float64 if n.dtype in expr.FLOATS else getattr(torch, n.dtype))
        else:
            assert isinstance(n, Apply)
            args, dtype = [known[a] for a in n.operands], getattr(torch, n.dtype)
            known[n] = args[0].to(dtype) if n.op == "cast" else frame.OPS[n.op](*args).to(dtype)
    return known[e]


def _lowest(dtype: str) -> Const:
    return const(torch.finfo(getattr(torch, dtype)).min, dtype)


def masks(dtype: str) -> st.SearchStrategy[Callable[[Expr], Expr]]:
    """Ways to mask a score by P, Q, or by a tensor, hard and soft ones, in any dtype."""
    truth = st.sampled_from([P, op("not", P), op("and", P, Q), op("or", P, op("not", Q)), op("ne", Load(dtype, 3, ()), 0.5)])
    as_float = truth.map(lambda p: cast(p, dtype))
    fill = st.sampled_from([-math.inf, -1e9, -1e4, -2.0, 3e4, _lowest(dtype).value, _lowest("bfloat16").value]).map(
        lambda x: const(x, dtype)
    )
    data = st.just(Load(dtype, 4, ()))
    one = const(1.0, dtype)

    def inverse(p: Expr) -> Expr:
        return op("sub", one, p)

    return st.one_of(
        st.builds(lambda p, x: lambda s: op("where", p, s, x), truth, fill),
        st.builds(lambda p, x: lambda s: op("add", s, op("where", p, const(0.0, dtype), x)), truth, fill),
        st.builds(lambda p, x: lambda s: op("add", op("mul", inverse(p), x), s), as_float, fill),
        st.builds(lambda p, x: lambda s: op("add", op("mul", s, p), op("mul", inverse(p), x)), as_float, fill),
        st.builds(lambda x: lambda s: op("maximum", s, x), fill),
        st.builds(lambda p, x: lambda s: op("minimum", s, op("where", p, const(math.inf, dtype), x)), truth, fill),
        st.builds(lambda x: lambda s: op("add", s, x), data),
        st.builds(lambda x, f: lambda s: op("add", s, op("mul", inverse(x), f)), data, fill),
        st.builds(lambda x, f: lambda s: op("sub", op("mul", s, x), op("mul", inverse(x), op("neg", f))), data, fill),
        st.just(lambda s: op("mul", s, 0.125)),
        st.just(lambda s: op("neg", op("neg", s))),
        st.just(lambda s: op("mul", op("tanh", op("div", s, 5.0)), 5.0)),
    )


SCORES = (0.0, -0.0, 1.5, -37.0, 900.0)


@settings(repeatable, max_examples=400)
@given(st.sampled_from(FLOAT_DTYPES).flatmap(lambda d: st.tuples(st.just(d), st.lists(masks(d), min_size=1, max_size=4))))
def test_a_separated_score_is_what_it_was_on_every_value(case: tuple[str, list[Callable[[Expr], Expr]]]) -> None:
    """Where the predicate holds, ``visible`` is the score; where it does not, the score is at most ``fill``."""
    dtype, steps = case
    score: Expr = Score(dtype)
    for step in steps:
        score = step(score)
    split = predicate.separate(score, 1)
    if split is None:
        return
    leaves: dict[Expr, list[Any]] = {P: [True, False], Q: [True, False], Score(dtype): list(SCORES)}
    leaves |= {Load(dtype, i, ()): list(DATA) for i in (3, 4)}
    values = {
        n: torch.tensor(v, dtype=torch.float64)
        .to(getattr(torch, n.dtype))
        .reshape([-1 if i == d else 1 for d in range(len(leaves))])
        for i, (n, v) in enumerate(leaves.items())
    }
    shape = [len(v) for v in leaves.values()]
    visible, expected, got = (evaluated(e, values).expand(shape) for e in (split.predicate, score, split.visible))
    assert torch.equal(torch.nan_to_num(expected[visible], 1.25), torch.nan_to_num(got[visible], 1.25))
    ordinary = torch.ones(shape, dtype=torch.bool)
    for term in predicate._without_score(score):
        value = evaluated(term, values)
        ordinary = (
            ordinary & (value <= intervals.largest(dtype))
            if any(isinstance(n, Load) and n.dtype != "bool" for n in expr.walk(term))
            else ordinary
        )
    hidden = expected[~visible & ordinary]
    assert bool((hidden <= split.fill).all()), (str(score), str(split.predicate), hidden.max(), split.fill)


# ------------------------------------------------------------------------------------------------- ranges of operators

ENDS = (-math.inf, -3.4e38, -65504.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 7e4, 1e28, math.inf)


def _range_of(operator: str, dtype: str) -> None:
    """The result for any points of any intervals lies in the interval that the operator gives."""
    arity = expr.ARITY[operator]
    leaves = free(dtype, arity)
    first = (P,) if operator == "where" else ()
    node = Apply(dtype, operator, leaves if not first else (P, *leaves[:2]))
    spans = [(a, b) for a in ENDS for b in ENDS if a <= b]
    chosen = spans if arity == 1 else spans[::7]
    for ends in itertools.product(chosen, repeat=min(arity, 2)):
        known: dict[Expr, Range] = {
            x: Range(expr.rounded(a, dtype), expr.rounded(b, dtype)) for x, (a, b) in zip(leaves, ends, strict=False)
        }
        found = intervals.applied(node, list(known.values()) if not first else [intervals.TRUTH, *known.values()])
        inside = [[x for x in (*ENDS, 0.3, -0.7, 2.5) if r.holds(expr.rounded(x, dtype))] for r in known.values()]
        points = torch.cartesian_prod(
            *(torch.tensor(p, dtype=torch.float64).to(getattr(torch, dtype)) for p in inside)
        ).reshape(-1, len(inside))
        columns = list(points.unbind(-1))
        for truth in (True, False) if first else (True,):
            args = [torch.tensor(truth), *columns] if first else columns
            got = frame.OPS[operator](*args).double()
            nan = got.isnan()
            assert found.nan or not nan.any(), (node, known, found)
            exact = operator in (*intervals.OPERATORS, "where", "floor", "ceil", "trunc", "round")
            low, high = (
                x if exact or math.isinf(x) else x + sign * 1e-6 * abs(x) for x, sign in ((found.low, -1), (found.high, 1))
            )
            assert bool(((got >= low) & (got <= high) | nan).all()), (node, known, found)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("operator", [*intervals.OPERATORS, *intervals._RISING, "where"])
def test_the_range_of_an_operator_holds_all_its_values(operator: str, dtype: str) -> None:
    _range_of(operator, dtype)


@pytest.mark.parametrize(("source", "target"), [*itertools.product(expr.DTYPES, repeat=2)])
def test_the_range_of_a_cast_holds_all_its_values(source: str, target: str) -> None:
    x = Load(source, 0, ())
    values = {a: expr.rounded(a.value, source) if source in expr.FLOATS else a.value for a in grid(source)}
    for low, high in itertools.combinations_with_replacement(sorted(x for x in values.values() if x == x), 2):
        found = intervals.applied(Apply(target, "cast", (x,)), [Range(float(low), float(high))])
        for a, value in values.items():
            if low <= value <= high and (math.isfinite(value) or target in expr.FLOATS):
                assert found.holds(float(torch_value(Apply(target, "cast", (a,))).item())), (source, target, value, found)


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


@settings(repeatable, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(-6, 6), st.sampled_from("qbsc1")), min_size=1, max_size=4),
    st.integers(1, 6), st.sampled_from([FloorDiv, PythonMod, None]), st.integers(1, 5),
)  # fmt: skip
def test_index_algebra_is_integer_arithmetic(terms: list[tuple[int, str]], n: int, inner: Any, m: int) -> None:
    """floordiv, mod, nonnegative and upper, on all values of the indices and sizes of a small grid."""
    space = Space()
    size = size_symbol("s")
    q, b = space.add("q", size), space.add("b", 4)
    names: dict[str, Any] = {"q": q, "b": b, "s": size, "c": q * size, "1": sympy.Integer(1)}
    e = sum((c * names[t] for c, t in terms), sympy.Integer(0))
    e = e if inner is None else e + 2 * inner(q + b, m)
    quotient, remainder = space.floordiv(e, sympy.Integer(n)), space.mod(e, sympy.Integer(n))
    positive, upper = space.nonnegative(e), space.upper(e)
    rejoined = index._rejoined(sympy.expand(n * quotient + remainder))
    for s, at_b in itertools.product((1, 2, 5), range(4)):
        for at_q in range(s):
            values = {q: at_q, b: at_b, size: s}
            expected = whole(e, values)
            assert whole(quotient, values) == expected // n and whole(remainder, values) == expected % n
            assert not positive or expected >= 0
            assert upper is None or expected <= whole(upper, values)
            assert whole(rejoined, values) == expected


# ------------------------------------------------------------------------------------------------------ whole predicates


def leaves() -> st.SearchStrategy[Expr]:
    q, k = expr.index("q"), expr.index("k")
    n, size, per_row = st.integers(-4, 6), st.integers(1, 4), Load("int64", 5, (q,))
    anything, data = (Load("int64", i, (expr.index("b0"),)) for i in (3, 4))
    block = st.builds(
        lambda c, m: (op("floordiv", op("add", q, c), m), op("floordiv", op("add", k, c), m)), st.integers(0, 2), size
    )
    extra = symbol("extra")
    comparison = st.sampled_from(expr.COMPARISONS)
    return st.one_of(
        st.builds(lambda c, x: op(c, op("sub", q, k), x), comparison, n),
        st.builds(lambda c, x: op(c, op("abs", op("sub", q, k)), x), comparison, n),
        st.builds(lambda c, m: op(c, *m), comparison, block),
        st.builds(lambda c, m: op(c, *m[::-1]), comparison, block),
        st.builds(lambda c, m, x: op(c, op("sub", *m), x), comparison, block, n),
        st.builds(lambda c, a, b, x: op(c, op("mul", k, a), op("add", op("mul", q, b), x)), comparison, n, n, n),
        st.builds(lambda c, x: op(c, k, op("add", x, data)), comparison, st.one_of(n.map(const), st.just(q))),
        st.builds(lambda c, x: op(c, k, op("maximum", q, x)), comparison, st.one_of(n.map(const), st.just(data))),
        st.builds(lambda c, x: op(c, x, anything), comparison, st.sampled_from([k, op("sub", k, q), op("sub", q, k)])),
        st.builds(lambda c: op(c, k, per_row), comparison),
        st.builds(lambda c: op(c, op("floordiv", k, extra), op("floordiv", q, extra)), comparison),
        st.builds(lambda c: op(c, op("sub", q, k), extra), comparison),
        st.builds(lambda m: op("eq", op("mod", op("sub", q, k), m), 0), size),
    )


def compositions() -> st.SearchStrategy[Expr]:
    join = lambda inner: st.one_of(  # noqa: E731
        st.builds(lambda c, a, b: op(c, a, b), st.sampled_from(["and", "or"]), inner, inner),
        st.builds(lambda a: op("not", a), inner),
    )
    return st.recursive(leaves(), join, max_leaves=4)


@settings(repeatable, max_examples=400)
@given(
    compositions(),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([-3, -1, 1, 2, 5, 2**63 - 1]),
    st.randoms(use_true_random=False),
)
def test_bounds_and_residual_are_the_predicate(keep: Expr, q_len: int, kv_len: int, extra: int, random: Any) -> None:
    """On the whole grid, for integers from tensors as large as there are; neither bound decreases with q."""
    huge, per_batch = (torch.tensor([random.choice(x) for _ in "01"]) for x in ([2, 2**63 - 1, -(2**63)], [-2, 0, 3, 7]))
    per_row = torch.tensor([random.randint(-2, 9) for _ in range(q_len)])
    given = problem(
        "float32", huge, per_batch, per_row, batch=(2, 1), q_len=q_len, kv_len=kv_len, qk_dim=2,
        score=lambda s: op("where", keep, s, -math.inf), symbols={"extra": extra},
    )  # fmt: skip
    found = bounds.bounds(given.spec, keep)
    mask = Mask(keep, given.spec.score, found.lower, found.upper, found.residual, -math.inf)
    spec = dataclasses.replace(given.spec, mask=mask)
    verify(spec)
    reference.check_mask(spec, given.operands, given.sizes)


# ------------------------------------------------------------------------------------------------------ nothing left out

PROOFS: dict[str, Callable[[], None]] = {
    **{name: (lambda name=name: _proved_by_z3(name)) for name in BY_Z3},  # type: ignore[misc]
    "cast to the same dtype": _cast_to_the_same_dtype,
    "function of a choice of constants": _functions_of_choices,
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
    "a shared tensor masks": test_a_separated_score_is_what_it_was_on_every_value,
}


def test_every_rule_has_a_proof() -> None:
    tables = (bounds.NEGATIONS, bounds.DISTANCES, bounds.SOLUTIONS, predicate.CASES, index.DIVISIONS)
    assert {rule.name for rule in RULES}.union(*tables) <= PROOFS.keys()
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("name", [name for name in PROOFS if name != "a shared tensor masks"])
def test_proof(name: str) -> None:
    PROOFS[name]()
