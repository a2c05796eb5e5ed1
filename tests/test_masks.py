"""Masks are recovered from the model's own code, in closed form where they have one, and never change a result."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from programs import attend, heads, pass_over
from torch import Tensor

from fuse import reference
from fuse.expr import to_text
from fuse.spec import AttentionSpec

N = 9
MIN = torch.finfo(torch.float32).min


def positions(q_len: int = N, kv_len: int = N) -> tuple[Tensor, Tensor]:
    return torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]


def bounds(spec: AttentionSpec) -> tuple[str, str, str]:
    """lower, upper and residual as text; "" where there is none."""
    assert spec.mask is not None
    lower, upper, residual = (x and to_text(x) for x in (spec.mask.lower, spec.mask.upper, spec.mask.residual))
    return lower or "", upper or "", residual or ""


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (lambda q, k: k <= q, ("", "1 + q", "")),
        (lambda q, k: q >= k, ("", "1 + q", "")),
        (lambda q, k: ~(k > q), ("", "1 + q", "")),
        (lambda q, k: k - q < 1, ("", "1 + q", "")),
        (lambda q, k: k <= q + 3, ("", "4 + q", "")),
        (lambda q, k: (k <= q) & (q - k < 4), ("q - 3", "1 + q", "")),
        (lambda q, k: (k <= q) & (k > q - 4), ("q - 3", "1 + q", "")),
        (lambda q, k: ~((k > q) | (q - k >= 4)), ("q - 3", "1 + q", "")),
        (lambda q, k: (q - k).abs() < 3, ("q - 2", "3 + q", "")),
        (lambda q, k: (k <= q) & (k % 2 == 0), ("", "1 + q", "(k % 2) == 0")),
        (lambda q, k: (k <= q) | (k < 2), ("", "", "(k <= q) or (k < 2)")),
        (lambda q, k: k // 4 == q // 4, ("4 * (q // 4)", "4 + (4 * (q // 4))", "")),
        (lambda q, k: (q // 4 == k // 4) & (k <= q), ("4 * (q // 4)", "minimum(4 + (4 * (q // 4)), 1 + q)", "")),
        (lambda q, k: k < torch.where(q < 3, 9, 2), ("", "", "k < where(q < 3, 9, 2)")),
        (lambda q, k: k < 9 - q, ("", "", "k < (9 - q)")),
    ],
)
@pytest.mark.parametrize(
    "spell",
    [
        lambda s, keep: torch.where(keep, s, -math.inf),
        lambda s, keep: s.masked_fill(~keep, MIN),
        lambda s, keep: s + torch.where(keep, 0.0, MIN),
        lambda s, keep: s + (1.0 - keep.float()) * MIN,
        lambda s, keep: s + torch.zeros(N, N).masked_fill(keep.logical_not(), -math.inf),
    ],
    ids=["where", "masked_fill", "add_where", "product", "add_filled"],
)
def test_a_predicate_of_positions_becomes_loop_bounds(
    keep: Callable[[Tensor, Tensor], Tensor], expected: tuple[str, str, str], spell: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spell(q @ k.transpose(-1, -2) / 4, keep(*positions())).softmax(-1) @ v

    assert bounds(pass_over(program, *heads(N)).spec) == expected


def test_a_mask_leaves_no_square_tensor_in_the_graph() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions()
        return attend(q, k, v, torch.where(keys <= rows, 0.0, MIN))

    graph = pass_over(program, *heads(N)).graph.graph
    square = [n.name for n in graph.nodes if tuple(getattr(n.meta.get("example_value"), "shape", ()))[-2:] == (N, N)]
    assert square == []


def test_padding_per_position_is_read_where_the_user_gave_it() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return attend(q, k, v, (1.0 - padding[:, None, None, :].float()) * MIN)

    padding = torch.ones(2, N, dtype=torch.long)
    padding[1, 5:] = 0
    spec = pass_over(program, *heads(N), padding).spec
    loaded = [to_text(x) for x in (spec.mask.residual,) if x is not None] if spec.mask else []
    assert loaded == [] or "[b0, k]" in loaded[0]
    assert all(o.rank <= 4 for o in spec.operands)


def test_a_small_fill_is_part_of_the_score_and_no_mask() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions()
        return attend(q, k, v, torch.where(keys <= rows, 0.0, -2.0))

    assert pass_over(program, *heads(N)).spec.mask is None


def test_an_addend_that_does_not_dwarf_every_score_is_no_mask() -> None:
    """score - 1e4 is no constant: whether it vanishes depends on the scores."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions()
        return attend(q, k, v, torch.where(keys <= rows, 0.0, -1e4))

    assert pass_over(program, *heads(N)).spec.mask is None


def test_two_masks_are_one_predicate() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        rows, keys = positions()
        score = (q @ k.transpose(-1, -2)).masked_fill(keys > rows, -math.inf)
        same = document[:, None, :, None] == document[:, None, None, :]
        return (score.masked_fill(~same, MIN)).softmax(-1) @ v

    lower, upper, residual = bounds(pass_over(program, *heads(N), torch.arange(18).reshape(2, N) // 4).spec)
    assert (lower, upper) == ("", "1 + q") and residual.count("[b0, ") == 2


# -------------------------------------------------------------------------------------------------- random predicates

Predicate = Callable[[Tensor, Tensor], Tensor]


def leaves() -> st.SearchStrategy[Predicate]:
    n = st.integers(-3, 6)
    return st.one_of(
        st.builds(lambda c: lambda q, k: k <= q + c, n),
        st.builds(lambda c: lambda q, k: q - k < c, n),
        st.builds(lambda c: lambda q, k: k < c, n),
        st.builds(lambda c: lambda q, k: q // c == k // c, st.integers(1, 5)),
        st.builds(lambda c: lambda q, k: (q - k) % c == 0, st.integers(1, 4)),
        st.builds(lambda c: lambda q, k: (k - q).abs() <= c, st.integers(0, 4)),
    )


def predicates() -> st.SearchStrategy[Predicate]:
    def combine(inner: st.SearchStrategy[Predicate]) -> st.SearchStrategy[Predicate]:
        return st.one_of(
            st.builds(lambda a, b: lambda q, k: a(q, k) & b(q, k), inner, inner),
            st.builds(lambda a, b: lambda q, k: a(q, k) | b(q, k), inner, inner),
            st.builds(lambda a: lambda q, k: ~a(q, k), inner),
        )

    return st.recursive(leaves(), combine, max_leaves=4)


SPELLINGS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda s, keep: torch.where(keep, s, -math.inf),
    lambda s, keep: torch.where(~keep, MIN, s),
    lambda s, keep: s.masked_fill(keep == 0, -1e9),
    lambda s, keep: s + torch.where(keep, 0.0, MIN).to(s.dtype),
    lambda s, keep: s + keep.logical_not().to(s.dtype) * -1e4,
    lambda s, keep: s * keep - 1e9 * (1 - keep.to(s.dtype)),
)


@settings(max_examples=60, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    predicates(), st.lists(st.sampled_from(SPELLINGS), min_size=1, max_size=2), st.integers(1, 12), st.integers(1, 12),
    st.integers(0, 10**6),
)  # fmt: skip
def test_random_masks_in_random_spellings_are_as_in_eager(
    keep: Predicate, spellings: list[Callable[[Tensor, Tensor], Tensor]], q_len: int, kv_len: int, seed: int
) -> None:
    torch.manual_seed(seed)
    torch._dynamo.reset()

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = q @ k.transpose(-1, -2) / 4
        for spell in spellings:
            score = spell(score, keep(*positions(q_len, kv_len)))
        return score.softmax(-1) @ v

    q, k, v = (x.double() for x in heads(q_len, kv_len, batch=1, count=2))
    passed = pass_over(program, q, k, v)
    torch.testing.assert_close(passed.result, program(q, k, v), equal_nan=True, rtol=1e-9, atol=1e-9)
    if passed.sites and passed.spec.mask is not None:  # a mask that hides everything leaves no scores to find
        reference.check_mask(passed.spec, _operands(passed.spec, q, k, v), [1, 2, q_len, kv_len])


def _operands(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Query, key and value under the numbers that the spec gives them; random masks load nothing else."""
    named = {spec.query.operand: q, spec.key.operand: k, spec.value.operand: v}
    return [named[i] for i in range(len(spec.operands))]
