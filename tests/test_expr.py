"""The scalar language: interning, construction, traversal, text, JSON, verifier."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import B0, KV_LEN, K, Q, both, cast, op

from fuse.ir import expr, serial, welltyped
from fuse.ir.expr import Apply, Const, Expr, Index, Load, Prob, Score, const, index, symbol
from fuse.ir.text import to_text

# ------------------------------------------------------------------------------------------------------ random nodes

integers = st.one_of(st.sampled_from([Q, K, B0, KV_LEN]), st.integers(-9, 9).map(const))
floats = st.one_of(
    st.just(Score("float32")), st.floats(width=32, allow_nan=False).map(lambda x: const(x, "float32")),
    st.builds(lambda i, j: Load("float32", 0, (i, j)), integers, integers),
)  # fmt: skip


def grow(leaves: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.recursive(leaves, lambda s: st.builds(op, st.sampled_from(["add", "mul", "minimum", "sub"]), s, s), max_leaves=8)


comparisons = st.builds(op, st.sampled_from(expr.COMPARISONS), grow(integers), grow(integers))
expressions = st.builds(lambda p, a, b: op("where", p, a, b), comparisons, grow(floats), grow(floats))
repeatable = settings(derandomize=True, max_examples=100, deadline=None)

# ------------------------------------------------------------------------------------------------------- construction


def test_equal_nodes_are_one_object() -> None:
    assert op("add", Q, 1) is op("add", Q, 1)
    assert Load("float32", 0, (Q, K)) is Load("float32", 0, (Q, K))


@pytest.mark.parametrize("pair", [(1, True), (0.0, -0.0), (1, 1.0)])
def test_constants_that_only_compare_equal_stay_apart(pair: tuple[float, float]) -> None:
    assert Const("float32", pair[0]) is not Const("float32", pair[1])


def test_nan_is_interned() -> None:
    assert const(math.nan, "float32") is const(float("nan"), "float32")


def test_integer_arithmetic_folds_and_float_arithmetic_is_left_to_the_target() -> None:
    assert op("floordiv", const(-7), const(2)) is const(-4)
    assert op("mod", const(-7), const(3)) is const(2)
    assert isinstance(op("add", const(0.1, "float32"), const(0.2, "float32")), Apply)


def test_division_by_a_zero_constant_is_not_folded() -> None:
    assert isinstance(op("mod", const(1), const(0)), Apply)


def test_casts_of_constants_round_as_pytorch_does() -> None:
    assert cast(const(1e5, "float32"), "float16") is const(math.inf, "float16")
    assert cast(const(1 / 3, "float64"), "bfloat16") is const(0.333984375, "bfloat16")
    assert cast(const(1.9, "float32"), "int64") is const(1)
    assert cast(Q, "int64") is Q


def test_truth_values_simplify() -> None:
    p, yes, no = op("le", K, Q), const(True, "bool"), const(False, "bool")
    assert op("and", p, yes) is p and op("and", no, p) is no
    assert op("or", p, no) is p and op("or", yes, p) is yes
    assert op("not", op("not", p)) is p and op("and", p, p) is p


def test_where_with_a_known_condition_or_equal_branches_disappears() -> None:
    s, fill = Score("float32"), const(-math.inf, "float32")
    assert op("where", const(True, "bool"), s, fill) is s
    assert op("where", const(False, "bool"), s, fill) is fill
    assert op("where", op("le", K, Q), s, s) is s


# ---------------------------------------------------------------------------------------------------------- traversal


def test_walk_gives_operands_first_and_each_node_once() -> None:
    shared = op("add", Q, K)
    root = op("mul", shared, shared)
    order = list(expr.walk(root))
    assert order == [Q, K, shared, root]


def test_walk_survives_deep_expressions() -> None:
    root: Expr = Q
    for _ in range(5000):
        root = op("add", root, K)
    assert sum(1 for _ in expr.walk(root)) == 5002


def test_substitute_replaces_below_loads() -> None:
    node = Load("float32", 0, (op("sub", K, Q),))
    assert expr.substitute(node, {Q: const(0)}) is Load("float32", 0, (op("sub", K, 0),))


def test_questions_about_an_expression() -> None:
    node = op("add", Load("float32", 2, (B0, op("sub", KV_LEN, K))), Score("float32"))
    assert expr.axes(node) == {"b0", "k"}
    assert expr.symbols(node) == ("kv_len",)
    assert expr.operands(node) == (2,)
    assert expr.contains(node, Score) and not expr.contains(node, Prob)


@repeatable
@given(expressions)
def test_rewriting_nothing_changes_nothing(root: Expr) -> None:
    assert expr.rewrite(root, lambda _: None) is root


# ------------------------------------------------------------------------------------------------------- text and JSON


def test_text_is_for_people() -> None:
    node = op("where", both(op("le", K, Q), op("lt", op("sub", Q, K), symbol("window"))), Score("float32"), -math.inf)
    assert str(node) == "where((k <= q) and ((q - k) < window), score, -inf)"
    assert str(op("mul", cast(Score("bfloat16"), "float32"), 0.5)) == "score * 0.5"
    assert to_text(Load("float32", 1, (Q,)), {1: "bias"}) == "bias[q]"


@repeatable
@given(expressions)
def test_json_gives_back_the_same_node(root: Expr) -> None:
    data = json.loads(json.dumps(serial.to_json({"root": root})))
    assert serial.from_json(data)["root"] is root


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 1e-45, 3.4028234663852886e38])
def test_json_keeps_every_float(value: float) -> None:
    node = const(value, "float32")
    assert serial.from_json(json.loads(json.dumps(serial.to_json({"x": node}))))["x"] is node


def test_json_writes_shared_terms_once() -> None:
    shared = op("add", Q, K)
    data = serial.to_json({"a": op("mul", shared, shared), "b": shared})
    assert len(data["nodes"]) == 4


def test_every_kind_of_node_survives_json() -> None:
    scalar = Load("float32", 0, ())
    roots: dict[str, Expr] = {"a": Score("bfloat16"), "b": Prob("float16"), "c": scalar, "d": const(True, "bool"), "e": KV_LEN}
    assert serial.from_json(json.loads(json.dumps(serial.to_json(roots)))) == roots


# ------------------------------------------------------------------------------------------------------------ verifier

SCORE, PREDICATE = Score("float32"), op("le", K, Q)

INVALID = {
    "unknown dtype": (Score("float8"), "is none of"),
    "index out of scope": (index("e"), "not in scope"),
    "operand that does not exist": (Load("float32", 3, (Q,)), "there are"),
    "too few coordinates": (Load("float32", 0, (Q,)), "has 2 dimensions"),
    "float coordinate": (Load("float32", 0, (Q, SCORE)), "not int64"),
    "unknown operator": (Apply("float32", "gelu", (SCORE,)), "with 1 operands"),
    "wrong arity": (Apply("float32", "add", (SCORE,)), "with 1 operands"),
    "mixed dtypes": (Apply("float32", "add", (SCORE, Score("bfloat16"))), "add of"),
    "condition that is not bool": (Apply("float32", "where", (SCORE, SCORE, SCORE)), "where of"),
    "where of two dtypes": (Apply("float32", "where", (PREDICATE, SCORE, Q)), "where of"),
    "comparison that is not bool": (Apply("int64", "lt", (Q, K)), "lt of"),
    "comparison of two dtypes": (Apply("bool", "lt", (Q, SCORE)), "lt of"),
    "logic on floats": (Apply("float32", "and", (SCORE, SCORE)), "and of"),
    "isnan as a float": (Apply("float32", "isnan", (SCORE,)), "isnan of"),
}


@pytest.mark.parametrize("name", INVALID)
def test_the_verifier_rejects(name: str) -> None:
    root, message = INVALID[name]
    with pytest.raises(match=message):
        welltyped.verify(root, axes_allowed=frozenset("qk"), operand_ranks={0: 2})


@repeatable
@given(expressions)
def test_the_verifier_accepts_what_is_well_typed(root: Expr) -> None:
    welltyped.verify(root, axes_allowed=frozenset({"q", "k", "b0"}), operand_ranks={0: 2})


def test_an_index_is_int64() -> None:
    assert Index("int64", "q") is Q
