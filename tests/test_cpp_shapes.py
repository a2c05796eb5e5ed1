"""C++ kernels on every length around the tile sizes, every instruction set this machine runs, and odd data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from decode_specs import DECODING
from problems import B0, K, Problem, Q, both, const, hide, load, op, problem, rand, symbol
from specs import CASES
from together import together

from fuse import targets
from fuse.ir.expr import Expr
from fuse.ir.spec import Mask
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import CppKernel, build

pytestmark = pytest.mark.compiler

LENGTHS = (1, 3, 5, 15, 16, 17, 33, 47, 49, 50, 65, 97, 98, 127, 129, 145, 146, 194, 257)
SCORES: dict[str, Callable[[Expr], object]] = {
    "full": lambda s: s,
    "causal": lambda s: hide(s, op("le", K, Q), upper=op("add", Q, 1)),
    "window": lambda s: hide(
        s, both(op("le", K, Q), op("gt", K, op("sub", Q, 9))), lower=op("sub", Q, 8), upper=op("add", Q, 1)
    ),
}  # fmt: skip

FEW = ("values_with_strided_features", "no_keys_yet", "low_sinks_beside_rows_of_padding", "cache_by_positions_in_bfloat16")


def check(made: Problem) -> torch.Tensor:
    out = targets.kernel(made.spec, "cpp")(made.operands, made.sizes)
    made.check(out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCORES)
def test_every_length(name: str, dtype: str) -> None:
    for q_len in LENGTHS:
        for kv_len in {q_len, 70, 128}:
            check(problem(dtype, batch=(1, 1), q_len=q_len, kv_len=kv_len, qk_dim=8, score=SCORES[name]))


@pytest.mark.parametrize("isa", ["avx2", "sse"])
def test_narrower_vectors_from_the_same_source(isa: str) -> None:
    if isa == "avx2" and instruction_set() in ("neon", "sse", "avx2"):
        pytest.skip("this machine has no AVX2, or nothing wider")
    names = ("plain", "causal_long", "vit_length", "t5_bias", "soft_cap", "left_padding_and_causal")
    problems = [CASES[name]("float32") for name in names]
    with together():
        kernels = [CppKernel(made.spec, build(made.spec, isa)) for made in problems]
    for made, kernel in zip(problems, kernels, strict=True):
        made.check(kernel(made.operands, made.sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FEW)
def test_few_queries(name: str, dtype: str) -> None:
    check(DECODING[name](dtype))


def test_few_queries_and_keys_under_a_mask_that_is_added() -> None:
    """gcc 12 left the product with the values out."""
    mask = rand(4, 4)
    low = op("le", load(mask, 3, Q, K), const(-30000.0, "float32"))
    seen = op("not", low)

    def score(s: Expr) -> tuple[Expr, Mask]:
        added = op("add", s, load(mask, 3, Q, K))
        return added, Mask(seen, added, None, None, seen, -10000.0)

    check(problem("float32", mask, batch=(1, 2), q_len=4, kv_len=4, qk_dim=8, v_dim=8, score=score))


def test_padding_of_many_tiles_is_skipped_or_full_or_partial() -> None:
    """Tiles of 64 keys: row 0 sees two whole and a part of a third, row 1 only the end, row 2 nothing but key 100."""
    keep = torch.zeros(3, 300, dtype=torch.bool)
    keep[0, :150], keep[1, 260:], keep[2, 100] = True, True, True
    check(problem("float32", keep, batch=(3, 2), q_len=50, kv_len=300, score=lambda s: hide(s, load(keep, 3, B0, K))))


def test_rows_that_see_nothing_average_although_tiles_are_skipped() -> None:
    """Left padding of more than a tile: eager's lowest fill makes those rows uniform over all keys."""
    keep = torch.arange(200) >= torch.tensor([[90], [0]])
    predicate = both(op("le", K, Q), load(keep, 3, B0, K))
    lowest = torch.finfo(torch.float32).min
    made = problem(
        "float32", keep, q_len=200,
        score=lambda s: hide(s, predicate, lowest, upper=op("add", Q, 1), residual=load(keep, 3, B0, K)),
    )  # fmt: skip
    out = check(made)
    torch.testing.assert_close(out[0, :, 5], made.operands[2][0].mean(-2), atol=1e-6, rtol=0)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    made = CASES["causal_long"]("float32")
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(targets.kernel(made.spec, "cpp")(made.operands, made.sizes))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_not_a_number_spreads_as_in_eager() -> None:
    """A NaN key spoils every row that sees it, and no other."""
    base = problem("float32", batch=(1, 1), q_len=100, score=SCORES["causal"])
    key = base.operands[1].clone()
    key[0, 0, 70] = math.nan
    out = check(replace(base, operands=[base.operands[0], key, base.operands[2]]))
    assert out[0, 0, 70:].isnan().all()
    assert not out[0, 0, :70].isnan().any()


def test_large_scores_do_not_overflow() -> None:
    base = problem("float32", batch=(1, 2))
    check(replace(base, operands=[base.operands[0] * 1e3, base.operands[1] * 1e3, base.operands[2]]))


def test_denormals_of_the_caller_are_left_alone() -> None:
    check(CASES["alibi"]("float32"))
    assert torch.tensor([1e-40]).mul(1.0).item() != 0


def test_sizes_and_symbols_are_run_time_arguments() -> None:
    """One kernel serves every length and every window."""

    def made(length: int, width: int) -> Problem:
        first = op("sub", op("add", Q, 1), symbol("window"))
        predicate = both(op("le", K, Q), op("ge", K, first))
        score = lambda s: hide(s, predicate, lower=first, upper=op("add", Q, 1))  # noqa: E731
        return problem("float32", q_len=length, score=score, symbols={"window": width})

    assert len({made(length, width).spec.to_json() for length, width in ((5, 2), (90, 70))}) == 1
    for length, width in ((5, 2), (90, 70), (90, 2**40), (300, 0)):
        check(made(length, width))


def test_read_past_an_operand_stays_inside_it() -> None:
    """A masked entry may name a place that does not exist; eager's own masking drops it."""
    bias = torch.randn(10)
    place = op("sub", Q, K)
    score = lambda s: op("where", op("ge", place, 0), op("add", s, load(bias, 3, place)), const(-math.inf, "float32"))  # noqa: E731
    made = problem("float32", bias, batch=(1, 1), q_len=10, score=score)
    out = targets.kernel(made.spec, "cpp")(made.operands, made.sizes)
    scores = (made.operands[0] @ made.operands[1].mT) * 0.25
    distance = torch.arange(10)[:, None] - torch.arange(10)
    expected = (scores + bias[distance.clamp(min=0)]).masked_fill(distance < 0, -math.inf).softmax(-1) @ made.operands[2]
    torch.testing.assert_close(out, expected)
