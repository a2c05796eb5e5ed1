"""bfloat16 on the matrix core: the named specs, and what its fixed softmax reference must survive."""

from __future__ import annotations

import math

import pytest
import torch
from problems import B0, B1, Q_LEN, K, Problem, Q, cast, hide, load, op, problem
from specs import CASES
from together import asked, for_queries, together
from torch import Tensor

from fuse.ir.expr import Expr, Score, const
from fuse.ir.spec import Mask
from fuse.targets.cpp import cpu, plan
from fuse.targets.cpp.launch import CppKernel, build
from fuse.targets.cpp.write import C_TYPES

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(cpu.matrix_unit() is None, reason="no AVX512-BF16"),
]


def run(p: Problem) -> Tensor:
    return CppKernel(p.spec, build(p.spec, "avx512_bf16"))(p.operands, p.sizes)


def causal(s: Expr) -> tuple[Expr, Mask]:
    return hide(s, op("le", K, Q), upper=op("add", Q, 1))


# What test_amx_emulated.py does not run through the same core: other reads along the keys, masks, rows that are redone.
NAMES = (
    "vit_length", "head_dim_7", "one_query", "three_batch_dimensions", "packed_qkv", "features_strided", "transposed_output",
    "prefix", "dilated", "padding", "documents", "dense_bool", "t5_bias", "relative_table", "decomposed_positions",
    "soft_cap_causal", "sinks", "masked_rows_are_zero", "masked_rows_added_fill", "masked_rows_with_sink",
    "two_lowest_masks_overflow", "integer_mask_product", "no_keys", "no_keys_beside_a_low_sink",
    "masked_rows_with_two_low_sinks",
    "positions_in_bfloat16", "documents_in_float16", "mapped_by_bfloat16", "score_in_bfloat16_decides",
    "coordinate_by_way_of_bfloat16", "weight_chosen_in_bfloat16", "result_in_float32", "shard_of_a_window",
    "sigmoid_attention", "squared_relu_causal", "retention", "linear_attention_causal", "divided_by_its_sum",
    "window_without_a_softmax", "padding_without_a_softmax", "biased_without_a_softmax", "no_keys_without_a_softmax",
    "decoding_without_a_softmax", "decoding_divided_by_its_sum", "weight_without_a_softmax",
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> dict[str, CppKernel]:
    names = [params["name"] for params in asked(request, test_kernel_is_within_twice_the_error_of_eager)]
    with together():
        return {name: kernel(CASES[name]("bfloat16")) for name in names}


def kernel(p: Problem) -> CppKernel:
    with for_queries(p.q_len):
        return CppKernel(p.spec, build(p.spec, "avx512_bf16"))


@pytest.mark.parametrize("name", NAMES)
def test_kernel_is_within_twice_the_error_of_eager(kernels: dict[str, CppKernel], name: str) -> None:
    p = CASES[name]("bfloat16")
    p.check(kernels[name](p.operands, p.sizes))


@pytest.mark.parametrize("isa", ["avx512_bf16", "amx"])
def test_plan_takes_the_matrix_core_for_bfloat16_only(isa: str) -> None:
    cores = {dtype: plan.plan(CASES["plain"](dtype).spec, isa).core for dtype in C_TYPES if "float" in dtype}
    assert cores == {"bfloat16": "matrix", "float32": "lanes", "float16": "lanes", "float64": "lanes"}


def test_scores_that_grow_along_the_keys_are_rescaled() -> None:
    """ALiBi's steepest head: the first tile's maximum is e**1400 times too small."""
    slope = torch.tensor([0.7, 0.1])
    p = problem(
        "bfloat16", slope, batch=(1, 2), q_len=2048, qk_dim=32,
        score=lambda s: causal(op("add", cast(s, "float32"), op("mul", load(slope, 3, B1), cast(op("sub", K, Q), "float32")))),
    )  # fmt: skip
    p.check(run(p))


def test_a_jump_beyond_float_is_computed_again() -> None:
    """Later scores exceed the first tile's by more than 2**128 can hold."""
    step = cast(op("ge", K, 128), "float32")
    p = problem("bfloat16", q_len=300, score=lambda s: op("add", cast(s, "float32"), op("mul", step, 500.0)))
    p.check(run(p))


def test_scores_that_fall_along_the_keys_lose_nothing() -> None:
    distance = cast(op("sub", const(0), K), "float32")
    p = problem("bfloat16", q_len=300, score=lambda s: op("add", cast(s, "float32"), op("mul", distance, 2.0)))
    p.check(run(p))


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.bfloat16).min, -math.inf])
def test_left_padding_does_not_set_the_reference(fill: float) -> None:
    """The mask comes as an additive tensor of unknown content; its first 130 keys are masked."""
    bias = torch.zeros(2, 1, 1, 200).index_fill(3, torch.arange(130), fill).bfloat16()
    p = problem("bfloat16", bias, q_len=200, score=lambda s: op("add", s, load(bias, 3, B0, const(0), const(0), K)))
    p.check(run(p))


def test_low_scores_that_are_no_mask_weigh_what_they_do() -> None:
    """The first tile's look like masked ones, the second one's do not, and are hardly larger."""
    bias = torch.full((128,), -9001.0).index_fill(0, torch.arange(64, 128), -8999.5)
    score = op("add", op("mul", cast(Score("bfloat16"), "float32"), 0.01), load(bias, 3, K))
    p = problem("bfloat16", bias, q_len=20, kv_len=128, score=lambda _: score)
    p.operands[2][:, :, 64:] += 2.0
    p.check(run(p))


@pytest.mark.parametrize("q_len", [1, 5, 17, 47, 48, 49, 63, 64, 65, 96, 97])
@pytest.mark.parametrize("kv_len", [1, 31, 33, 64, 65, 127, 128, 191])
def test_every_tail(q_len: int, kv_len: int) -> None:
    p = problem("bfloat16", batch=(2,), q_len=q_len, kv_len=kv_len, qk_dim=40, v_dim=24)
    p.check(run(p))


def test_large_values_do_not_overflow_the_sum() -> None:
    p = problem("bfloat16", q_len=100)
    p.operands[2].mul_(2.0**100)
    out = run(p)
    expected = torch.softmax((p.operands[0].double() @ p.operands[1].double().mT) / 4, -1) @ p.operands[2].double()
    assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_large_values_of_later_keys_with_larger_scores_do_not_overflow() -> None:
    """Their weights are far above one, and their sum is a number that the product with the values is not."""
    step = op("mul", cast(op("ge", K, 64), "float32"), 60.0)
    p = problem("bfloat16", q_len=100, score=lambda s: op("add", cast(s, "float32"), step))
    p.operands[2].mul_(2.0**100)
    out = run(p)
    key, value = (x[:, :, 64:].double() for x in p.operands[1:])  # beside them all others vanish
    expected = torch.softmax(p.operands[0].double() @ key.mT / 4, -1) @ value
    assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_rows_of_infinite_and_nan_scores_are_nan_and_no_others() -> None:
    p = problem("bfloat16", q_len=70)
    p.operands[0][0, 0, 3, 0] = math.nan
    p.operands[0][1, 2, 66, 1] = math.inf
    nan = run(p).isnan()
    assert torch.equal(nan.all(-1), nan.any(-1)) and nan.any(-1).nonzero().tolist() == [[0, 0, 3], [1, 2, 66]]


def test_dense_mask_rows_that_end_at_the_tensor_are_not_read_beyond() -> None:
    """The mask's last row ends its memory: 37 keys, no whole vector."""
    page = torch.zeros(37 * 37).bfloat16()
    bias = page.view(37, 37)
    p = problem("bfloat16", bias, batch=(2, 2), score=lambda s: op("add", s, load(bias, 3, Q, K)))
    p.check(run(p))


def test_reversed_table_is_read_backwards() -> None:
    """A coordinate that falls with the key: no vector of neighbours."""
    table = torch.randn(399).bfloat16()
    place = op("add", op("sub", Q, K), op("sub", Q_LEN, 1))
    p = problem("bfloat16", table, q_len=200, score=lambda s: op("add", s, load(table, 3, place)))
    p.check(run(p))


@pytest.mark.parametrize("name", ["vit_length", "dense_additive", "causal_long"])
def test_error_is_near_that_of_sdpa(name: str) -> None:
    """The mean error is at most a tenth above that of weights relative to the true maximum, whose largest is exactly 1."""
    p = CASES[name]("bfloat16")
    q, k, v = p.operands[:3]
    bias = p.operands[3].expand(-1, 3, -1, -1) if name == "dense_additive" else None
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def error(out: Tensor) -> float:
        mask = None if bias is None else bias.double()
        exact = sdpa(q.double(), k.double(), v.double(), mask, is_causal=name == "causal_long")
        return float((out.double() - exact).nan_to_num().pow(2).mean().sqrt())

    assert error(run(p)) <= 1.1 * error(sdpa(q, k, v, bias, is_causal=name == "causal_long"))
