"""Masks are recovered from the model's own code, in closed form where they have one, and never change a result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz import masks
from fuzz.program import Program
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from programs import attend, heads, pass_over
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.ir.text import to_text
from fuse.targets import reference

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
        (lambda q, k: (k <= q) | (k < 2), ("", "maximum(1 + q, 2)", "")),
        (lambda q, k: k // 4 == q // 4, ("4 * (q // 4)", "4 + (4 * (q // 4))", "")),
        (lambda q, k: (q // 4 == k // 4) & (k <= q), ("4 * (q // 4)", "minimum(4 + (4 * (q // 4)), 1 + q)", "")),
        (lambda q, k: k < torch.where(q < 3, 9, 2), ("", "", "k < where(q < 3, 9, 2)")),
        (lambda q, k: k < 9 - q, ("", "", "k < (9 - q)")),
        (lambda q, k: (q - k).abs() > 2, ("", "", "abs(q - k) > 2")),
        (lambda q, k: k <= torch.maximum(q, torch.tensor(3)), ("", "maximum(1 + q, 4)", "")),
        (lambda q, k: k // 4 <= q // 4, ("", "4 + (4 * (q // 4))", "")),
        (lambda q, k: (k + 2) // 4 == (q + 2) // 4, ("(4 * ((2 + q) // 4)) - 2", "2 + (4 * ((2 + q) // 4))", "")),
        (lambda q, k: (q // 4 - k // 4).abs() <= 1, ("(4 * (q // 4)) - 4", "8 + (4 * (q // 4))", "")),
        (lambda q, k: 2 * k <= 3 * q, ("", "1 + ((3 * q) // 2)", "")),
        (lambda q, k: (k <= q) & ((q - k < 3) | (k < 2)), ("", "1 + q", "((q - k) < 3) or (k < 2)")),
        (
            lambda q, k: ((k <= q) & (q - k < 3)) | (k == q),
            ("minimum(q - 2, q)", "1 + q", "((k <= q) and ((q - k) < 3)) or (k == q)"),
        ),
    ],
)
def test_a_predicate_of_positions_becomes_loop_bounds(
    keep: Callable[[Tensor, Tensor], Tensor], expected: tuple[str, str, str]
) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).masked_fill(~keep(*positions()), MIN).softmax(-1) @ v

    assert bounds(pass_over(program, *heads(N)).spec) == expected


# ------------------------------------------------------------------------------------------------------ without a softmax

LONG = 96  # of fewer keys nothing would be saved


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (lambda s, seen: s.relu().square().masked_fill(~seen, 0), ("", "1 + q", "")),
        (lambda s, seen: s.masked_fill(~seen, -math.inf).sigmoid(), ("", "1 + q", "")),
        (lambda s, seen: (s + torch.zeros(LONG, LONG).masked_fill(~seen, -math.inf)).exp(), ("", "1 + q", "")),
        (lambda s, seen: s * torch.where(seen, 0.5, 0.0), ("", "1 + q", "")),
        (lambda s, seen: s.sigmoid() * seen, ("", "1 + q", "")),
        (lambda s, seen: torch.where(seen, s.sigmoid(), -s.sigmoid()), None),  # at most zero, and not zero
        (lambda s, seen: s.masked_fill(~seen, -1e9), None),  # what vanishes under a softmax
    ],
)
def test_without_a_softmax_what_is_zero_is_masked(
    weights: Callable[[Tensor, Tensor], Tensor], expected: tuple[str, str, str] | None
) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions(LONG, LONG)
        return weights(q @ k.mT / 4, keys <= rows) @ v

    spec = pass_over(program, *heads(LONG)).spec
    assert spec.normalisation == "none"
    assert (None if spec.mask is None else bounds(spec)) == expected


# ------------------------------------------------------------------------------------------------- many spellings of one


def causal() -> Tensor:
    rows, keys = positions()
    return keys <= rows


def window() -> Tensor:
    rows, keys = positions()
    return rows - keys < 4


def filled_twice(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(N, N, dtype=dtype).masked_fill(~a, LOWEST[dtype])
    return mask.masked_fill((mask == 0) & ~b, LOWEST[dtype])


LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)}
CAUSAL, BOTH, EITHER = "k <= q", "(k <= q) and ((q - k) < 4)", "(k <= q) or ((q - k) < 4)"

SPELT: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "first GPT": (CAUSAL, lambda s: s * causal().to(s.dtype) - 1e4 * (1 - causal().to(s.dtype))),
    "product and infinities": (CAUSAL, lambda s: s * causal() + torch.where(causal(), 0.0, -math.inf)),
    "lowest added": (CAUSAL, lambda s: s + torch.where(causal(), 0.0, LOWEST[s.dtype]).to(s.dtype)),
    "lowest times inverse": (CAUSAL, lambda s: s + (1.0 - causal().to(s.dtype)) * LOWEST[s.dtype]),
    "added before the scale": (CAUSAL, lambda s: (s + torch.where(causal(), 0.0, -math.inf)) * 0.5),
    "minimum": (CAUSAL, lambda s: torch.minimum(s, torch.where(causal(), math.inf, -math.inf).to(s.dtype))),
    "clamped": (CAUSAL, lambda s: (s + torch.where(causal(), 0.0, -math.inf)).clamp(min=LOWEST[s.dtype])),
    "negative": (CAUSAL, lambda s: -torch.where(causal(), -s, math.inf)),
    "subtracted": (CAUSAL, lambda s: s - torch.where(causal(), 0.0, math.inf)),
    "log": (CAUSAL, lambda s: s + causal().float().log()),
    "negated thrice": (CAUSAL, lambda s: s.masked_fill(~~~causal(), -math.inf)),
    "equal to zero": (CAUSAL, lambda s: s.masked_fill(causal().to(torch.uint8) == 0, -math.inf)),
    "xor": (CAUSAL, lambda s: s.masked_fill(causal() ^ True, -math.inf)),
    "additive mask compared": (CAUSAL, lambda s: s.masked_fill(torch.where(causal(), 0.0, -1e9) < -1, -math.inf)),
    "two where": (BOTH, lambda s: torch.where(causal(), torch.where(window(), s, -1e9), LOWEST[s.dtype])),
    "two additive": (BOTH, lambda s: s + torch.where(causal(), 0.0, -math.inf) + torch.where(window(), 0.0, -math.inf)),
    "product of bytes": (BOTH, lambda s: s.masked_fill((causal().byte() * window().byte()) == 0, -math.inf)),
    "sum of integers": (BOTH, lambda s: s.masked_fill(causal().int() + window().int() < 2, -math.inf)),
    "minimum of masks": (BOTH, lambda s: s.masked_fill(torch.minimum(causal().int(), window().int()) == 0, -math.inf)),
    "filled in turn": (BOTH, lambda s: s.masked_fill(~window(), -1e5).masked_fill(~causal(), -math.inf)),
    "filled where not filled yet": (BOTH, lambda s: s + filled_twice(causal(), window(), s.dtype)),
    "nested": (EITHER, lambda s: torch.where(causal(), s, torch.where(window(), s, -math.inf))),
    "any of integers": (EITHER, lambda s: s.masked_fill(causal().int() + window().int() == 0, -math.inf)),
    "choice of additive": (EITHER, lambda s: s + torch.where(causal(), 0.0, torch.where(window(), 0.0, -math.inf))),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELT)
def test_a_predicate_is_read_out_of_any_spelling_in_any_dtype(name: str) -> None:
    expected, spell = SPELT[name]

    def program(*inputs: Tensor) -> list[Tensor]:
        scores = [(q @ k.transpose(-1, -2) / 4, v) for q, k, v in zip(*[iter(inputs)] * 3, strict=True)]
        return [spell(s).softmax(-1).to(v.dtype) @ v for s, v in scores]

    sites = pass_over(program, *(x.to(dtype) for dtype in LOWEST for x in heads(N))).sites
    masks = [site.spec.mask for site in sites if site.spec is not None]
    assert [m and " and ".join(sorted(to_text(m.predicate).split(" and "), key=len)) for m in masks] == [expected] * 3
    assert not any("where" in to_text(m.visible) for m in masks if m)


def padding() -> Tensor:
    return torch.ones(2, 1, 1, N, dtype=torch.long).index_fill_(-1, torch.tensor([7, 8]), 0)


GIVEN: dict[str, tuple[str, Callable[..., Tensor], Tensor]] = {
    "ones where visible": ("[b0, 0, 0, k] != 0", lambda s, m: s + (1.0 - m.float()) * MIN, padding()),
    "ones where masked": ("[b0, 0, 0, k] != 1", lambda s, m: s + m.float() * MIN, 1 - padding()),
    "product with a buffer": ("[q, k] != 0", lambda s, m: s * m - 1e4 * (1 - m), torch.ones(N, N).tril()),
    "additive per key": ("not([b0, 0, 0, k] <= -2e+28)", lambda s, m: s + m, (1 - padding().float()) * MIN),
    "additive per entry": ("not([b0, 0, q, k] <= -2e+28)", lambda s, m: s + m, torch.zeros(2, 1, N, N)),
    "additive for all": ("not([q, k] <= -2e+28)", lambda s, m: (s + m) / 4, torch.zeros(N, N)),
    "lengths": ("k < [b0]", lambda s, m: s.masked_fill(torch.arange(N) >= m, -math.inf), torch.tensor([9, 6]).view(2, 1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_tensors_shared_by_heads_tell_what_is_masked(name: str) -> None:
    expected, spell, given = GIVEN[name]

    def program(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return spell(q @ k.transpose(-1, -2) / 4, mask).softmax(-1) @ v

    spec = pass_over(program, *heads(N), given).spec
    assert spec.mask is not None
    found = to_text(spec.mask.predicate, dict.fromkeys(range(9), "")).replace("[b0, 0, 0, 0]", "[b0]")
    assert found == expected


def test_a_mask_that_is_repeated_for_each_head_is_shared_by_them() -> None:
    """Where heads are a part of the batch, as bmm takes them."""

    def program(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q, k, v, mask[:, None].expand(2, 3, N, N).reshape(6, N, N))

    spec = pass_over(program, *(x.flatten(0, 1) for x in heads(N)), torch.zeros(2, N, N)).spec
    assert spec.mask is not None and "[(b0 // 3), q, k] <= -2e+28" in to_text(spec.mask.predicate)


@pytest.mark.parametrize("shape", [(2, 3, N, N), (3, N, N), (3, 1, N)])
def test_a_bias_per_head_is_no_mask(shape: tuple[int, ...]) -> None:
    assert pass_over(attend, *heads(N), torch.randn(shape)).spec.mask is None


def test_a_condition_on_data_that_masks_nothing_stays_in_the_score() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        s = torch.where(bias > 0, s + bias, s - 2)
        return s.masked_fill(~causal(), -math.inf).softmax(-1) @ v

    mask = pass_over(program, *heads(N), torch.randn(2, 3, N, N)).spec.mask
    assert mask is not None and str(mask.predicate) == CAUSAL
    assert to_text(mask.visible, dict.fromkeys(range(9), "")).startswith("where([b0, b1, q, k] > 0, score + ")


SYMBOLIC: dict[str, tuple[tuple[str, str, str], Callable[[int], Tensor]]] = {
    "offset": (("", "(1 + held) + q", ""), lambda n: positions()[1] <= positions()[0] + n),
    "window": (("(1 + q) - held", "1 + q", ""), lambda n: causal() & (positions()[0] - positions()[1] < n)),
    "prefix": (("", "maximum(n0, 1 + q)", ""), lambda n: (positions()[1] < n) | causal()),
    "blocks": (("minimum(begin, (begin + n0) + 1)", "maximum(begin + n0, begin + 1)", ""),
               lambda n: positions()[0] // n == positions()[1] // n),
}  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_bounds_of_sizes_that_are_known_at_run_time(name: str) -> None:
    expected, keep = SYMBOLIC[name]

    def program(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        return (q @ k.transpose(-1, -2)).masked_fill(~keep(n), -math.inf).softmax(-1) @ v

    found = bounds(pass_over(program, *heads(N), 5, dynamic=True).spec)
    short = {
        "maximum(minimum(n0, 1099511627776), -1099511627776)": "held",
        "((q // n0) * n0)": "begin",
        "(q // n0) * n0": "begin",
    }
    for text, name in short.items():
        found = tuple(x.replace(text, name) for x in found)
    assert found == expected


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


# ------------------------------------------------------------------------------------------------------- random masks

EXAMPLES, TOGETHER = 100, 5  # programs, and cases in each of them
HOW = ("spelt",) * 7 + ("sdpa", "added")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Program, Program]:
    """Attention under one or two masks in float64, and the function that gives what it lets be seen."""
    texts, how = draw(st.lists(masks.forms(stored=True), min_size=1, max_size=2)), draw(st.sampled_from(HOW))
    given = {"skipped": f"randn({draw(st.integers(1, 99))})", "q": "randn(2, 2, n, 4)", "k": "randn(2, 2, m, 4)"}
    given |= {"v": "randn(2, 2, m, 4)"} | {name: masks.DATA[name].replace("B", "2") for t in texts for name in masks.read(t)}
    both = " & ".join(f"({text})" for text in texts)
    lines = ["n, m = q.shape[2], k.shape[2]", "i, j = torch.arange(n)[:, None], torch.arange(m)", "s = q @ k.mT / 2"]
    seen = (*lines, f"return ({both}).expand(2, 1, n, m)")
    if how == "spelt":
        for text in texts:
            lines += [f"keep = {text}", f"s = {draw(st.sampled_from(masks.SPELLINGS)).format(keep='keep')}"]
        lines += ["return s.softmax(-1) @ v"]
    else:
        fill = draw(st.sampled_from(("-math.inf", "torch.finfo(torch.float32).min")))
        mask = f"({both}).expand(2, 1, n, m)"
        mask = mask if how == "sdpa" else f"torch.where({mask}, 0.25, {fill}).double()"
        lines += [f"return F.scaled_dot_product_attention(q, k, v, attn_mask={mask})"]
    lengths = ((draw(st.integers(1, 7)), draw(st.integers(1, 7))),)
    made: Any = [Program(tuple(given.items()), tuple(body), lengths, "float64") for body in (lines, seen)]
    return made[0], made[1]


def test_random_masks_in_random_spellings_are_as_in_eager() -> None:
    """500 cases, each as eager in float64; what is said of a mask is true; and hardly a mask is missed."""
    count: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
    @given(st.lists(cases(), min_size=TOGETHER, max_size=TOGETHER))
    def check(drawn: list[tuple[Program, Program]]) -> None:
        torch._dynamo.reset()
        functions = [attention.function() for attention, _ in drawn]
        inputs = [attention.drawn(attention.lengths[0]) for attention, _ in drawn]

        def program(given: list[list[Tensor]]) -> list[Tensor]:
            return [function(*x) for function, x in zip(functions, given, strict=True)]

        passed = pass_over(program, inputs)
        for got, expected in zip(passed.result, program(inputs), strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-9, atol=1e-9)
        for call in passed.calls:
            reference.check_mask(call.spec, call.operands, call.sizes)
        seen = [visible.function()(*x) for (_, visible), x in zip(drawn, inputs, strict=True)]
        visible = [bool(x.any()) for x in seen]  # a mask that hides everything leaves no scores to find
        hiding = sum(not bool(x.all()) for x in seen) - visible.count(False)
        count["cases"] += len(drawn)
        count["not fused"] += visible.count(True) - len(passed.calls)
        count["missed"] += max(0, hiding - sum(call.spec.mask is not None for call in passed.calls))

    check()
    assert count["cases"] == 500
    assert count["not fused"] <= 5 and count["missed"] <= 5, count
