"""Biases of the distance become tables of all distances: no tensor of q_len × kv_len entries is left, layers share one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from programs import Passed, attend, attention_calls, computed, heads, pass_over, square
from specs import CASES
from spellings.biases import bucket
from torch import Tensor

from fuse.ir import expr
from fuse.ir.expr import Load, apply, const, index, symbol
from fuse.ir.grid import Grid
from fuse.ir.text import to_text
from fuse.passes.read.elements import spec_reader
from fuse.passes.tables import by_distance

N, M = 37, 53  # queries and keys: no other size of the programs is so large


def distances(q_len: int = N, kv_len: int = M, offset: int = 0) -> Tensor:
    return torch.arange(kv_len)[None, :] - (torch.arange(q_len)[:, None] + offset)


def table_load(passed: Passed) -> str:
    (load,) = [n for n in expr.walk(passed.spec.score) if isinstance(n, Load)]
    return to_text(load).partition("[")[2].rstrip("]")


def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor, offset: int = 0) -> Tensor:
    bias = torch.nn.functional.embedding(bucket(distances(offset=offset)), table).permute([2, 0, 1]).unsqueeze(0)
    return attend(q, k, v, bias)


def log_distance(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    """KERPLE: -a * log(1 + b * distance)."""
    a, b = rates[:, :, None, None]
    return attend(q, k, v, -a * torch.log1p(b * distances().abs()))


def in_chunks(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """An index of the distance cut off at both ends, one table for each head."""
    return attend(q, k, v, table.mT[:, (distances().clamp(-8, 7) + 8) // 2])


def windows(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """Two terms of one function of the distance."""
    decay = torch.exp(distances().abs() * -0.1)
    return attend(q, k, v, slope[:, None, None] * decay + distances().float().sigmoid())


PROGRAMS = [
    pytest.param(t5, lambda: torch.randn(8, 3), id="T5"),
    pytest.param(log_distance, lambda: torch.rand(2, 3), id="KERPLE"),
    pytest.param(in_chunks, lambda: torch.randn(8, 3), id="clipped"),
    pytest.param(windows, lambda: torch.rand(3), id="two terms"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("program", "learned"), PROGRAMS)
def test_a_costly_function_of_the_distance_is_computed_once_for_each_distance(
    program: object, learned: object, dynamic: bool
) -> None:
    tensors = (*heads(N, M), learned())  # type: ignore[operator]
    passed = pass_over(program, *tensors, dynamic=dynamic)  # type: ignore[arg-type]
    assert passed.sites[0].fused and table_load(passed) == "b1, (((k + q_len) - 1) - q)"
    torch.testing.assert_close(passed.result, program(*tensors))  # type: ignore[operator]
    assert dynamic or square(passed, N * M) == []


def test_the_table_has_as_many_entries_as_there_are_distances() -> None:
    passed = pass_over(t5, *heads(N, M), torch.randn(8, 3))
    assert computed(passed)[attention_calls(passed)[0].args[0][-1]].shape == (3, N + M - 1)


def test_layers_share_one_table() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = torch.nn.functional.embedding(bucket(distances(N, N)), table).permute([2, 0, 1])
        return attend(attend(q, k, v, bias), k, v, bias)

    passed = pass_over(program, *heads(N), torch.randn(8, 3))
    first, second = attention_calls(passed)
    assert len(passed.sites) == 2 and first.args[0][-1] is second.args[0][-1]


def test_a_table_beside_a_mask_holds_the_bias_alone() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = torch.nn.functional.embedding(bucket(distances()), table).permute([2, 0, 1])
        causal = torch.where(distances() <= 0, 0.0, torch.finfo(q.dtype).min)
        return attend(q, k, v, bias + causal)

    tensors = (*heads(N, M), torch.randn(8, 3))
    passed = pass_over(program, *tensors)
    assert (
        passed.spec.mask is not None and to_text(passed.spec.mask.visible).count("[b1, ") == 1 and square(passed, N * M) == []
    )
    torch.testing.assert_close(passed.result, program(*tensors))


def test_a_bias_that_is_rounded_behind_its_mask_is_one_table() -> None:
    """Else the score and what is visible of it would read two, of which one says nothing of the other."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = distances()
        return attend(q, k, v, torch.where(d <= 0, 0.9 ** -d.clamp(max=0), -torch.inf).to(q.dtype))

    spec = pass_over(program, *(x.bfloat16() for x in heads(N, M))).spec
    assert spec.mask is not None and len(spec.operands) == 4


def test_a_cheap_function_of_the_distance_is_computed_for_each_entry() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return attend(q, k, v, slope[:, None, None] * distances())

    spec = pass_over(program, *heads(N, M), torch.rand(3)).spec
    assert all("q" not in expr.axes(n) for n in expr.walk(spec.score) if isinstance(n, Load))


def test_what_depends_on_the_place_is_no_table() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return attend(q, k, v, torch.log1p(distances().abs() * scale))

    tensors = (*heads(N, M), torch.rand(M))
    passed = pass_over(program, *tensors)
    assert "q_len" not in expr.symbols(passed.spec.score)
    torch.testing.assert_close(passed.result, program(*tensors))


def test_a_shifted_query_reads_the_same_distances() -> None:
    """As with a cache: query i stands at position 16 + i."""
    tensors = (*heads(N, M), torch.randn(8, 3), 16)
    passed = pass_over(t5, *tensors)
    assert square(passed, N * M) == []
    torch.testing.assert_close(passed.result, t5(*tensors))


# --------------------------------------------------------------------------------------------- random integer formulas


def formulas() -> st.SearchStrategy[expr.Expr]:
    leaves = st.one_of(
        st.sampled_from([index("q"), index("k"), symbol("q_len"), symbol("kv_len")]), st.integers(-3, 5).map(const)
    )
    ops = st.sampled_from(["add", "sub", "minimum", "maximum", "floordiv", "mod", "le", "eq"])

    def combine(inner: st.SearchStrategy[expr.Expr]) -> st.SearchStrategy[expr.Expr]:
        return st.builds(_applied, ops, inner, inner)

    return st.recursive(leaves, combine, max_leaves=8)


def _applied(op: str, a: expr.Expr, b: expr.Expr) -> expr.Expr:
    if op in ("floordiv", "mod"):
        return apply(op, a, const(3), dtype="int64")
    if op in ("le", "eq"):
        return apply("where", apply(op, a, b, dtype="bool"), a, const(1), dtype="int64")
    return apply(op, a, b, dtype="int64")


@settings(max_examples=200, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(formulas(), st.integers(1, 7), st.integers(1, 7))
def test_a_formula_that_passes_as_one_of_the_distance_is_one(formula: expr.Expr, q_len: int, kv_len: int) -> None:
    r = spec_reader(CASES["plain"]("float32").spec)
    r.space.add("r", r.symbols["q_len"] + r.symbols["kv_len"] - 1)
    found = by_distance(r, formula)
    if found is None:
        return
    sizes = {"q_len": q_len, "kv_len": kv_len}
    entries = Grid.over({"q": (0, q_len), "k": (0, kv_len)}, sizes).evaluate(formula).expand(q_len, kv_len)
    table = Grid.over({"r": (0, q_len + kv_len - 1)}, sizes).evaluate(found).expand(q_len + kv_len - 1)
    assert torch.equal(entries, table[distances(q_len, kv_len) + q_len - 1])


def test_tables_of_one_formula_in_two_dtypes_are_two() -> None:
    def program(*x: Tensor) -> list[Tensor]:
        return [attend(q, k, v, torch.log1p(distances().abs().to(q.dtype))) for q, k, v in (x[:3], x[3:])]

    tensors = (*heads(N, M), *(x.double() for x in heads(N, M)))
    passed = pass_over(program, *tensors)
    assert [site.fused for site in passed.sites] == [True, True]
    for result, expected in zip(passed.result, program(*tensors), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=16 * torch.finfo(expected.dtype).eps)
