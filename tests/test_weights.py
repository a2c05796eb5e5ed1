"""Weights beside a result: every target writes what the reference says, whole and averaged over heads, with its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from problems import Problem, own_products
from specs import CASES, RANDOM_CASES
from together import asked, narrow, runs, together
from torch import Tensor

import fuse
import fuse.ops.weights
from fuse import targets
from fuse.ir.spec import AttentionSpec
from fuse.ir.weights import weights_shape
from fuse.ops.warm import ExpectedCall
from fuse.qualify import faster, right
from fuse.qualify.verdict import case_of
from fuse.report.runs import Runs
from fuse.targets import reference
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import CppKernel, build
from fuse.targets.cpp.launch_weights import CppWeights, build_weights

ALL = {name: make for name, make in (CASES | RANDOM_CASES).items() if make("float32").spec.softmax}
# What is read, rounded, masked and dropped by dtype.
BY_DTYPE = (
    "plain", "causal", "transposed_output", "two_extra_logits", "masked_rows_lowest_fill", "left_padding_and_causal", "no_keys",
    "relative_table", "integer_mask_product",
)  # fmt: skip
# Scores by the matrix unit: tails of queries, keys and features, groups, strides, masks, rows that are written exactly.
MATRIX = (
    "vit_length", "head_dim_7", "head_dim_80", "grouped_query", "features_strided", "documents", "window", "no_queries",
    "masked_rows_with_low_sinks",
)  # fmt: skip
EMULATED = ("head_dim_7", "cross_attention", "left_padding_and_causal")
OWN = instruction_set()
CHOSEN = [(name, "float32", OWN) for name in ALL]
CHOSEN += [(n, d, OWN) for n in BY_DTYPE for d in ("bfloat16", "float16", "float64")]
CHOSEN += [(n, "bfloat16", OWN) for n in MATRIX] + [(n, "bfloat16", "amx_emulated") for n in EMULATED]


def averaged(p: Problem) -> Problem:
    """Means are summed up, and given, in what log-sum-exps are."""
    return replace(p, spec=replace(p.spec, out_dtype=p.spec.lse_dtype))


def check(p: Problem, matrix: Tensor, heads: int) -> None:
    """No farther from float64 than twice eager's distance, and a few roundings; NaN where eager has NaN."""
    with own_products():
        exact, eager = (reference.weights(p.spec, p.operands, p.sizes, heads, how) for how in ("exact", "eager"))
    assert matrix.shape == weights_shape(p.spec, p.sizes, heads) and matrix.is_contiguous()
    assert matrix.dtype == eager.dtype and torch.equal(matrix.isnan(), eager.isnan())
    if matrix.numel():
        allowed = 2 * (eager.double() - exact).nan_to_num().abs().amax() + 8 * torch.finfo(matrix.dtype).eps
        error = (matrix.double() - exact).nan_to_num().abs().amax()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


# ----------------------------------------------------------------------------------------------------------- kernels

Way = tuple[str, str, str]  # name, dtype, instruction set
Kernels = dict[Way, tuple[CppKernel, CppWeights, CppWeights]]


def built(p: Problem, isa: str) -> tuple[CppKernel, CppWeights, CppWeights]:
    mean = averaged(p)
    with narrow(2):
        result = CppKernel(p.spec, build(p.spec, isa))
        return result, *(CppWeights(spec, build_weights(spec, isa)) for spec in (p.spec, mean.spec))


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    ways = [p["chosen"] for p in asked(request, test_a_kernel_writes_what_the_reference_says)]
    with together():
        return {(name, dtype, isa): built(ALL[name](dtype), isa) for name, dtype, isa in ways if runs(isa)}


@pytest.mark.compiler
@pytest.mark.parametrize("chosen", CHOSEN, ids="-".join)
def test_a_kernel_writes_what_the_reference_says(kernels: Kernels, chosen: Way) -> None:
    name, dtype, isa = chosen
    if not runs(isa):
        pytest.skip(f"this machine has no {isa}")
    p = ALL[name](dtype)
    result, whole, mean = kernels[chosen]
    _, lse = result.forward(p.operands, p.sizes)
    check(p, whole(p.operands, lse, p.sizes, 0), 0)
    if p.spec.batch:
        heads = p.sizes[p.spec.batch - 1]
        check(averaged(p), mean(p.operands, lse, p.sizes, heads), heads)


# ---------------------------------------------------------------------------------------------------------- the ops


def given(p: Problem, operands: list[Tensor], heads: int, target: str = "reference") -> tuple[Tensor, Tensor]:
    """The result and the weights."""
    text = p.spec.to_json()
    out, _, lse = torch.ops.fuse.attention_rows(operands, p.sizes, text, target)
    return out, torch.ops.fuse.attention_weights(operands, lse, p.sizes, text, target, heads)


def leaves(p: Problem) -> list[Tensor]:
    return [t.clone().requires_grad_(t.is_floating_point()) for t in p.operands]


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("name", ["plain", "causal", "grouped_query", "weight_factor", "two_extra_logits", "dropout"])
def test_opcheck(name: str, heads: int) -> None:
    p = ALL[name]("float32")
    heads = p.sizes[1] if heads else 0
    _, lse = reference.attention_with_lse(p.spec, p.operands, p.sizes, "eager")
    arguments = (leaves(p), lse, p.sizes, p.spec.to_json(), "reference", heads)
    torch.library.opcheck(torch.ops.fuse.attention_weights.default, arguments)
    torch.library.opcheck(torch.ops.fuse.attention_rows.default, (p.operands, p.sizes, p.spec.to_json(), "reference"))


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize(
    "name, target",
    [(name, "reference") for name in ("plain", "causal", "sinks", "weight_factor", "alibi", "dropout", "grouped_query")]
    + [pytest.param(name, "cpp", marks=pytest.mark.compiler) for name in ("causal", "weight_factor", "dropout")],
)
def test_gradients_of_weights_are_those_of_autograd(name: str, target: str, heads: int) -> None:
    """In float64, of the weights alone and of the result and the weights together."""
    p = ALL[name]("float64")
    heads = p.sizes[1] if heads else 0
    numbers = torch.randn(
        weights_shape(p.spec, p.sizes, heads), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    operands, others = leaves(p), leaves(p)
    out, matrix = given(p, operands, heads, target)
    wanting = [t for t in operands if t.requires_grad]
    alone = torch.autograd.grad((matrix * numbers).sum(), wanting, retain_graph=True, materialize_grads=True)
    plain = reference.weights_at_once(p.spec, others, p.sizes, heads)
    want = torch.autograd.grad((plain * numbers).sum(), [t for t in others if t.requires_grad], materialize_grads=True)
    for got, expected in zip(alone, want, strict=True):
        torch.testing.assert_close(got, expected)
    of_result = torch.autograd.grad(out.sum(), wanting, retain_graph=True, materialize_grads=True)
    both = torch.autograd.grad(out.sum() + (matrix * numbers).sum(), wanting, materialize_grads=True)
    for got, *parts in zip(both, alone, of_result, strict=True):
        torch.testing.assert_close(got, sum(parts))


def test_where_no_gradient_arrives_at_weights_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd hands zeros to a graph whose weights nobody differentiates."""

    def never(*of: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("fuse.ops.weights._gradient_text", never)

    def program(q: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ q.mT / 4).softmax(-1)
        return p @ q, p

    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        q = torch.randn(2, 3, 9, 16, requires_grad=True)
        out, weights = torch.compile(program, backend="fuse", options={"inner": inner, "target": "reference"})(q)
        out.sum().backward()
        with pytest.raises(AssertionError, match="computed"):
            torch.compile(program, backend="fuse", options={"inner": inner, "target": "reference"})(q)[
                1
            ].square().sum().backward()


@pytest.mark.parametrize("heads", [0, 1])
def test_second_derivatives_and_tangents_of_weights_are_plain_pytorch(heads: int) -> None:
    p = CASES["causal"]("float64")
    small = replace(p, operands=[t[:1, :1, :5] for t in p.operands], sizes=[1, 1, 5, 5])

    def matrix(*operands: Tensor) -> Tensor:
        return given(small, list(operands), heads)[1]

    assert torch.autograd.gradcheck(matrix, leaves(small), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(matrix, leaves(small))


@pytest.mark.parametrize("heads", [0, 3])
def test_under_vmap_weights_are_those_of_each_example(heads: int) -> None:
    p = CASES["causal"]("float64")
    many = torch.stack([p.operands[0], p.operands[0] * 2])
    found = torch.func.vmap(lambda q: given(p, [q, *p.operands[1:]], heads)[1])(many)
    for q, matrix in zip(many, found, strict=True):
        torch.testing.assert_close(matrix, reference.weights(p.spec, [q, *p.operands[1:]], p.sizes, heads))
    weights = torch.randn(found.shape[1:], dtype=torch.float64)
    of_each = torch.func.vmap(torch.func.grad(lambda q: (given(p, [q, *p.operands[1:]], heads)[1] * weights).sum()))(many)
    for q, grad in zip(many, of_each, strict=True):
        leaf = q.clone().requires_grad_()
        (reference.weights_at_once(p.spec, [leaf, *p.operands[1:]], p.sizes, heads) * weights).sum().backward()
        torch.testing.assert_close(grad, leaf.grad)


def test_a_target_without_kernels_for_weights_says_so() -> None:
    from toy_target import ToyTarget

    from fuse.targets import registry

    registry.register(ToyTarget())

    def program(q: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ q.mT / 4).softmax(-1)
        return p @ q, p

    fuse.reset()
    torch.compile(program, backend="fuse", options={"inner": "eager", "target": "toy"})(torch.randn(2, 3, 9, 16))
    (site,) = fuse.report().sites
    assert str(site.reason).endswith("the graph's output: target 'toy' has no kernels that write weights")
    spec: AttentionSpec = CASES["plain"]("float32").spec
    with pytest.warns(RuntimeWarning, match="attention weights without its kernels.*no kernels for weights"):
        assert targets.weights_kernel(spec, "toy").runs.by == "reference"
    assert math.prod(weights_shape(spec, [2, 3, 4, 5], 3)) == 2 * 4 * 5


# ------------------------------------------------------------------------------------------ a kernel earns its place


def call_of(p: Problem, target: str, heads: int) -> ExpectedCall:
    metas = tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in p.operands)
    text = p.spec.to_json()
    return ExpectedCall(text, target, metas, tuple(p.sizes), torch.device("cpu"), ((text, heads),))


class Halved:
    """Weights that are half of what they are."""

    runs = Runs("kernel")

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    def __call__(self, operands: Sequence[Tensor], lse: Tensor, sizes: Sequence[int], heads: int) -> Tensor:
        return reference.weights(self._spec, operands, sizes, heads, "eager") / 2


@pytest.mark.parametrize("heads", [0, 3])
def test_weights_are_checked_before_they_are_trusted(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(CASES["causal"]("float32"), "reference", heads)
    assert not [f for f in right.findings(call, [True] * 3) if f.wrong]
    monkeypatch.setattr(targets, "weights_kernel", lambda spec, target: Halved(spec))
    assert {f.part for f in right.findings(call, [True] * 3) if f.wrong} == {"the weights"}


def test_weights_are_timed_beside_the_operations_that_a_model_writes() -> None:
    call = call_of(CASES["causal"]("float32"), "reference", 0)
    times = faster.times(call, [False] * 3, called=False)
    assert times is not None and times.name == faster.PLAIN and times.fuse > 0
    trained = faster.times(call, [True] * 3, called=False)
    assert trained is not None and trained.other > 0


def test_a_verdict_is_of_what_is_written_beside_the_result() -> None:
    p = CASES["causal"]("float32")
    whole, mean = (case_of(call_of(p, "reference", heads), [False] * 3, "") for heads in (0, 3))
    alone = case_of(replace(call_of(p, "reference", 0), weights=()), [False] * 3, "")
    assert len({whole.key, mean.key, alone.key}) == 3
