"""Every operator of the expression language, wherever C++ computes it: once per head, per query, per key or per entry."""

from __future__ import annotations

import pytest
from operator_specs import KINDS, LEVELS, of_operators
from problems import KV_LEN, K, Problem, Q, cast, load, op, problem, rand
from together import asked, narrow, together

from fuse import targets
from fuse.ir.expr import const
from fuse.targets.cpp.launch import CppKernel, build

pytestmark = pytest.mark.compiler

Solved = dict[tuple[str, str], tuple[Problem, CppKernel]]


@pytest.fixture(scope="module")
def solved(request: pytest.FixtureRequest) -> Solved:
    cases = [(p["kind"], p["level"]) for p in asked(request, test_operators_are_those_of_pytorch)]
    problems = {case: of_operators(*case) for case in cases}
    with together(), narrow():
        return {case: (made, CppKernel(made.spec, build(made.spec))) for case, made in problems.items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_operators_are_those_of_pytorch(solved: Solved, kind: str, level: str) -> None:
    made, kernel = solved[kind, level]
    made.check(kernel(made.operands, made.sizes))


def test_integers_beyond_32_bits_keep_their_value() -> None:
    """Document numbers may be hashes."""
    ids = (rand(37) > 0).long() * 2**40 + (rand(37, seed=1) > 0).long()
    same = op("eq", load(ids, 3, Q), load(ids, 3, K))
    made = problem("float32", ids, score=lambda s: op("where", same, s, const(-1.0, "float32")))
    made.check(targets.kernel(made.spec, "cpp")(made.operands, made.sizes))


def test_index_arithmetic_does_not_overflow() -> None:
    product = op("mul", op("mul", op("add", Q, 50000), op("add", K, 50000)), KV_LEN)
    made = problem("float32", score=lambda s: op("add", s, cast(op("mod", product, 11), "float32")))
    made.check(targets.kernel(made.spec, "cpp")(made.operands, made.sizes))
