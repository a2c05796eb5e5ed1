"""fuse::attention: what torch asks of an op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from problems import Problem
from programs import attend, heads, pass_over
from specs import CASES, RANDOM_CASES
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fuse.ops.attention  # noqa: F401  (defines the op)
from fuse.errors import TangentOfGradient
from fuse.ops import warm
from fuse.targets import reference

CHECKED = ("plain", "causal", "heads_last_output", "packed_qkv", "grouped_query", "window", "no_batch", "empty_batch")


def attention(made: Problem, operands: list[Tensor] | None = None) -> Tensor:
    text = made.spec.to_json()
    out: Tensor = torch.ops.fuse.attention(operands or made.operands, made.sizes, text, "reference")
    return out


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str) -> None:
    made = CASES[name]("float32")
    arguments = (made.operands, made.sizes, made.spec.to_json(), "reference")
    torch.library.opcheck(torch.ops.fuse.attention.default, arguments)


@pytest.mark.parametrize("name", CASES)
def test_the_op_runs_every_case(name: str) -> None:
    made = CASES[name]("float32")
    made.check(attention(made))


@pytest.mark.parametrize("name", CASES)
def test_the_fake_has_the_layout_of_the_result(name: str) -> None:
    made = CASES[name]("bfloat16")
    real, fake = attention(made), attention(made, [t.to("meta") for t in made.operands])
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_one_graph_serves_every_length(inner: str) -> None:
    made = CASES["causal"]("float32")
    text = made.spec.to_json()

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [*q.shape[:3], k.shape[2]]
        out: Tensor = torch.ops.fuse.attention([q * 2, k, v], sizes, text, "reference")
        return out + 1

    counter = CompileCounterWithBackend(inner)
    compiled = torch.compile(program, backend=counter, dynamic=True, fullgraph=True)
    for length in (37, 20, 11):
        q, k, v = (t[:, :, :length].clone() for t in made.operands)
        torch.testing.assert_close(compiled(q, k, v), program(q, k, v), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def trained(made: Problem, *frozen: int) -> list[Tensor]:
    """The operands, those of floats as leaves that want a gradient but for the ``frozen``."""
    return [t.clone().requires_grad_(t.is_floating_point() and i not in frozen) for i, t in enumerate(made.operands)]


def gradients(program: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """Of the result's product with fixed numbers, for the operands that want one."""
    out = program(*operands)
    numbers = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return list(torch.autograd.grad((out * numbers).sum(), [t for t in operands if t.requires_grad]))


def expected_gradients(made: Problem, operands: list[Tensor]) -> list[Tensor]:
    shape = made.spec.out_shape(made.sizes)
    numbers = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
    found = reference.attention_backward(made.spec, numbers, operands, made.sizes, [t.requires_grad for t in operands])
    return [g.float() for g in found]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["packed_qkv", "sinks", "dropout", "relative_table"])
def test_gradients_of_every_operand(name: str, backend: str) -> None:
    made = {**CASES, **RANDOM_CASES}[name]("float32")
    operands = trained(made)
    text = made.spec.to_json()

    def program(*operands: Tensor) -> Tensor:
        out: Tensor = torch.ops.fuse.attention(list(operands), made.sizes, text, "reference")
        return out

    compiled = torch.compile(program, backend=backend, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, operands), expected_gradients(made, operands), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_frozen_operands_get_no_gradient_and_the_others_theirs(frozen: tuple[int, ...], backend: str) -> None:
    made = CASES["dense_additive"]("float32")
    operands = trained(made, *frozen)
    program = torch.compile(lambda *operands: attention(made, list(operands)), backend=backend)
    torch.testing.assert_close(gradients(program, operands), expected_gradients(made, operands), rtol=1e-4, atol=1e-5)


def test_gradients_under_symbolic_sizes_in_one_graph() -> None:
    made = CASES["causal"]("float32")
    text, counter = made.spec.to_json(), CompileCounterWithBackend("aot_eager")

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.fuse.attention([q, k, v], [*q.shape[:3], k.shape[2]], text, "reference")
        return out

    compiled = torch.compile(program, backend=counter, dynamic=True, fullgraph=True)
    for length in (37, 20):
        operands = [t[:, :, :length].clone().requires_grad_() for t in made.operands]
        torch.testing.assert_close(gradients(compiled, operands), gradients(program, operands), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_the_graph_of_training_holds_the_two_plain_ops() -> None:
    made, seen = CASES["plain"]("float32"), set[str]()

    def compiler(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        seen.update(str(n.target) for n in gm.graph.nodes if "fuse" in str(n.target))
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    gradients(torch.compile(lambda *operands: attention(made, list(operands)), backend=backend), trained(made))
    assert seen == {"fuse.attention_forward.default", "fuse.attention_backward.default"}


def test_forward_and_backward_pass_opcheck() -> None:
    made = CASES["dense_additive"]("float32")
    text = made.spec.to_json()
    forward, backward = torch.ops.fuse.attention_forward.default, torch.ops.fuse.attention_backward.default
    torch.library.opcheck(forward, (made.operands, made.sizes, text, "reference"))
    out, lse = forward(made.operands, made.sizes, text, "reference")
    wanted = [True, False, True, True]
    torch.library.opcheck(backward, (out, made.operands, made.sizes, out, lse, text, "reference", wanted))


def test_a_second_backward_over_a_retained_graph_gives_the_same() -> None:
    made = CASES["plain"]("float32")
    operands = trained(made)
    out = attention(made, operands)
    first = torch.autograd.grad(out.sum(), operands, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), operands), first, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["relative_table", "soft_cap_causal", "sinks", "weight_factor"])
def test_a_second_derivative_is_that_of_the_reference(case: str) -> None:
    """Against differences of the first one in float64, along random directions."""
    made = CASES[case]("float64")
    operands = trained(made)
    leaves = [t for t in operands if t.requires_grad]
    torch.autograd.gradgradcheck(lambda *_: attention(made, operands), leaves, fast_mode=True)


# ---------------------------------------------------------------------------------------- the log-sum-exp as a result


def _with_log_sums(dtype: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of three operands that gives the result and the rows' log-sum-exp."""
    made = CASES["causal"](dtype)
    text = made.spec.to_json()
    return lambda *x: torch.ops.fuse.attention_lse(list(x), made.sizes, text, "reference"), made.operands


def _weighed(results: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of the log-sum-exp lies across its rows."""
    out, lse = results
    return out.square().sum() + (lse.mT * torch.linspace(-1, 1, lse.numel()).view_as(lse.mT)).sum()


@pytest.mark.parametrize("asked", [0, 1], ids=["result", "log-sum-exp"])
def test_many_gradients_at_once_are_those_of_each_result(asked: int) -> None:
    function, operands = _with_log_sums("float32")
    leaves = [t.requires_grad_() for t in operands]
    result = function(*leaves)[asked]
    many = rand_like(result, 3)
    found = torch.autograd.grad(result, leaves[:2], many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(result, leaves[:2], one, retain_graph=True) for one in many]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))), rtol=0, atol=1e-6)


def test_each_example_has_its_gradients_through_the_log_sum_exp() -> None:
    function, operands = _with_log_sums("float32")
    gradient = torch.func.grad(lambda *x: _weighed(function(*x)), (0, 1, 2))
    examples = [torch.stack([t, t / 2, 2 * t]) for t in operands]
    each = [gradient(*(x[i] for x in examples)) for i in range(3)]
    found = torch.vmap(gradient)(*examples)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))), rtol=1e-5, atol=1e-5)


def test_the_largest_score_passes_opcheck_is_that_of_each_example_and_of_no_keys_none() -> None:
    made = CASES["causal"]("float32")
    text, op = made.spec.to_json(), torch.ops.fuse.attention_max
    torch.library.opcheck(op.default, (trained(made), made.sizes, text))
    examples = [torch.stack([t, t / 2, 2 * t]) for t in made.operands]
    each = torch.stack([op([x[i] for x in examples], made.sizes, text) for i in range(3)])
    torch.testing.assert_close(torch.vmap(lambda *x: op(list(x), made.sizes, text))(*examples), each)
    q, k, v = made.operands
    none = op([q, k[..., :0, :], v[..., :0, :]], [*made.sizes[:-1], 0], text)
    assert none.shape == q.shape[:-1] and bool(none.isneginf().all())


def test_tangents_and_second_derivatives_of_both_results_are_differences() -> None:
    function, operands = _with_log_sums("float64")
    along = [rand_like(t, 1)[0] for t in operands]
    _, tangents = torch.func.jvp(function, tuple(operands), tuple(along))
    ahead, behind = (function(*(t + s * a for t, a in zip(operands, along, strict=True))) for s in (1e-6, -1e-6))
    torch.testing.assert_close(
        tangents, tuple((a - b) / 2e-6 for a, b in zip(ahead, behind, strict=True)), rtol=1e-5, atol=1e-7
    )
    torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in operands], fast_mode=True)


def test_whatever_comes_of_the_log_sum_exp_of_a_row_that_sees_nothing_goes_nowhere() -> None:
    """It is minus infinity, of which many functions have no derivative: two parts that see nothing are merged to NaN."""
    made = CASES["causal_more_queries_than_keys"]("float32")
    leaves = trained(made)
    out, lse = torch.ops.fuse.attention_lse(leaves, made.sizes, made.spec.to_json(), "reference")
    assert bool(lse.isneginf().any())
    nothing = torch.where(lse.isneginf(), 0.0, 1.0)
    found, expected = (
        torch.autograd.grad((out, lse), leaves, (out, of_rows), retain_graph=True) for of_rows in (nothing / nothing, nothing)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_calls_of_a_graph_are_told_apart_by_strides_and_told_once() -> None:
    """A kernel may be another where operands lie in another way."""

    def program(q: Tensor, k: Tensor, v: Tensor, across: Tensor) -> Tensor:
        return attend(q, k, v) + attend(q * 2, k, v) + attend(across, k, v)

    q, k, v = heads()
    graph = pass_over(program, q, k, v, q.mT.contiguous().mT).graph
    assert len(list(warm.calls(graph))) == 2


def test_the_log_sum_exp_of_an_infinite_score_is_infinite() -> None:
    """Kernels have infinity for a row that sees nothing, too."""
    made = CASES["plain"]("float32")
    made.operands[0][0, 0, 5] = torch.zeros(16).index_fill(0, torch.tensor([0]), math.inf)
    out, lse = torch.ops.fuse.attention_lse(made.operands, made.sizes, made.spec.to_json(), "reference")
    assert lse[0, 0, 5] == math.inf and bool(out[0, 0, 5].isnan().all()) and bool(lse[1].isfinite().all())


def rand_like(t: Tensor, count: int) -> Tensor:
    return torch.randn(count, *t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(0))


def test_the_tangent_of_a_gradient_says_what_to_do() -> None:
    made = CASES["plain"]("float32")
    q, *others = made.operands

    def total(scale: Tensor) -> Tensor:
        return attention(made, [q * scale, *others]).sum()

    with pytest.raises(TangentOfGradient, match="twice in reverse mode, or"):
        torch.func.hessian(total)(torch.tensor(1.0))


def test_gradients_that_are_broadcast_reach_the_kernel() -> None:
    made = CASES["plain"]("float32")
    operands = trained(made)
    shape = made.spec.out_shape(made.sizes)
    found = torch.autograd.grad(attention(made, operands), operands, torch.ones(()).expand(shape))
    exact = reference.attention_backward(made.spec, torch.ones(shape).double(), operands, made.sizes, [True] * 3)
    torch.testing.assert_close(list(found), [g.float() for g in exact], rtol=1e-4, atol=1e-5)


def test_inference_mode_and_autocast_leave_the_operands_as_they_are() -> None:
    made = CASES["plain"]("float32")
    expected = reference.attention(made.spec, made.operands, made.sizes, "eager")
    with torch.inference_mode(), torch.autocast("cpu"):
        assert torch.equal(attention(made), expected)


def test_an_unreadable_spec_is_an_error() -> None:
    with pytest.raises(ValueError):
        torch.ops.fuse.attention([torch.ones(2, 2)], [2, 2], "{", "reference")


@pytest.mark.compiler
@pytest.mark.parametrize("target", ["reference", "cpp"])
def test_over_no_keys_every_sum_is_zero(target: str) -> None:
    """A length that is data, such as the number of tokens that a router chose, may be zero when the graph runs."""
    spec = CASES["plain"]("float32").spec
    q, k, v = (torch.randn(2, 3, n, spec.qk_dim, requires_grad=True) for n in (5, 0, 0))
    with torch.no_grad():
        assert torch.equal(torch.ops.fuse.attention([q, k, v], [2, 3, 5, 0], spec.to_json(), target), torch.zeros(2, 3, 5, 16))
    out = torch.ops.fuse.attention([q, k, v], [2, 3, 5, 0], spec.to_json(), target)
    assert torch.equal(out, torch.zeros(2, 3, 5, 16))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))
