"""Calls of C++ kernels do not go through Python, but for the first, for derivatives, and for what a kernel does not take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import problem
from torch import Tensor
from torch.autograd import forward_ad

from fuse import targets
from fuse.ops import attention
from fuse.targets import reference
from fuse.targets.cpp import op

pytestmark = pytest.mark.compiler


@pytest.fixture(autouse=True)
def loaded() -> Iterator[None]:
    op.load()
    assert op._loaded
    yield
    targets.reset()


@pytest.fixture
def no_python(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From when it is called on, who asks Python for a kernel fails."""

    def asked(*call: object) -> Any:
        raise AssertionError(f"Python was asked for a kernel: {call}")

    return lambda: monkeypatch.setattr(attention, "_kernel", asked)


def call(made: Any, text: str, name: str = "attention") -> Any:
    return getattr(torch.ops.fuse, name).default(made.operands, made.sizes, text, "cpp")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_second_call_is_the_kernels_own(dtype: str, no_python: Any) -> None:
    """Result and log-sum-exp as by way of Python: values, dtypes and strides."""
    made = problem(dtype, batch=(2, 3), q_len=9)
    kernel = targets.kernel(made.spec, "cpp")
    expected = (kernel(made.operands, made.sizes), *kernel.forward(made.operands, made.sizes))
    call(made, made.spec.to_json())
    no_python()
    found = (call(made, made.spec.to_json()), *call(made, made.spec.to_json(), "attention_forward"))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()


def test_sizes_are_those_of_the_call(no_python: Any) -> None:
    call(first := problem("float32", batch=(1, 2), q_len=5), text := first.spec.to_json())
    no_python()
    for q_len in (1, 7, 40):
        made = problem("float32", batch=(3, 2), q_len=q_len)
        assert made.spec == first.spec
        torch.testing.assert_close(call(made, text), reference.attention(made.spec, made.operands, made.sizes, "eager"))


def test_a_compiled_model_asks_python_once(no_python: Any) -> None:
    q, k, v = (torch.randn(2, 9, 3, 16).transpose(1, 2) for _ in range(3))
    compiled = torch.compile(F.scaled_dot_product_attention, backend="fuse", dynamic=False)
    with torch.no_grad():
        compiled(q, k, v)
        no_python()
        torch.testing.assert_close(compiled(q, k, v), F.scaled_dot_product_attention(q, k, v))


def packed(x: Tensor) -> Tensor:
    """Query, key and value are parts of one tensor: its gradient is one tensor to which three destinations write."""
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in x.split([32, 32, 32], -1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(x: Tensor) -> Tensor:
    """Queries of four heads, keys and values of two."""
    q, k, v = (x[..., first : first + n].unflatten(-1, (-1, 16)).transpose(1, 2) for first, n in ((0, 64), (64, 32), (96, 32)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def biased(x: Tensor) -> Tensor:
    """The bias has a gradient that is summed: not a matter of one tensor for each operand."""
    q, k, v = x[:, :, :16], x[:, :, 16:32], x[:, :, 32:48]
    return F.scaled_dot_product_attention(q, k, v, x[:, :9, :1].mT.expand(-1, 9, 9) + x[:, :9, 50:59])


@pytest.mark.parametrize("attend", [packed, grouped, biased])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_later_calls_are_those_of_the_first(attend: Any, dtype: torch.dtype) -> None:
    """The first goes through Python, the others do not; their layouts are those of operands."""
    x = torch.randn(2, 9, {packed: 96, grouped: 128, biased: 64}[attend]).to(dtype).requires_grad_()
    compiled = torch.compile(attend, backend="fuse", dynamic=False)
    found = [torch.autograd.grad(compiled(x).float().square().sum(), x)[0] for _ in range(3)]
    expected = torch.autograd.grad(attend(x).float().square().sum(), x)[0]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    bar = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found[2], expected, atol=bar, rtol=bar)


def test_training_asks_python_once(no_python: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 9, 96, requires_grad=True)
    compiled = torch.compile(packed, backend="fuse", dynamic=False)
    compiled(x).sum().backward()
    no_python()
    monkeypatch.setattr(attention, "_backward_kernel", attention._kernel)
    found = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(packed(x).square().sum(), x), atol=1e-5, rtol=1e-5)


def test_sizes_beyond_the_first_eight_are_right_too() -> None:
    compiled = torch.compile(packed, backend="fuse", dynamic=True)
    for length in (*range(5, 16), *range(5, 16)):
        x = torch.randn(2, length, 96, requires_grad=True)
        found = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(packed(x).square().sum(), x), atol=1e-5, rtol=1e-5)


def test_a_derivative_of_gradients_is_left_to_python() -> None:
    q, k, v = (torch.randn(1, 5, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    compiled = torch.compile(F.scaled_dot_product_attention, backend="fuse", dynamic=False, options={"inner": "eager"})

    def penalty(attend: Any) -> Tensor:
        (grad,) = torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), k)[0]

    penalty(compiled)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = penalty(F.scaled_dot_product_attention)
    torch.testing.assert_close(penalty(compiled), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_operands_that_want_a_gradient_get_it_where_gradients_are_on(grad_mode: bool) -> None:
    made = problem("float32", batch=(1, 2), q_len=5)
    text, leaves = made.spec.to_json(), [t.detach().requires_grad_(t.is_floating_point()) for t in made.operands]
    call(made, text)
    with torch.set_grad_enabled(grad_mode):
        out = torch.ops.fuse.attention.default(leaves, made.sizes, text, "cpp")
    assert out.requires_grad == grad_mode


def test_a_tangent_is_not_lost() -> None:
    made = problem("float32", batch=(1, 2), q_len=5)
    call(made, text := made.spec.to_json())
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in made.operands]
        out = torch.ops.fuse.attention.default(duals, made.sizes, text, "cpp")
        assert forward_ad.unpack_dual(out).tangent is not None


def test_what_a_kernel_does_not_take_goes_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuse.targets.cpp.render.MAX_LENGTH", 4)
    made = problem("float32", batch=(1, 1), q_len=5)
    expected = reference.attention(made.spec, made.operands, made.sizes, "eager")
    with pytest.warns(RuntimeWarning, match="more than"):
        torch.testing.assert_close(call(made, made.spec.to_json()), expected)
    torch.testing.assert_close(call(made, made.spec.to_json()), expected)


def test_a_text_of_another_target_is_not_taken_for_ours() -> None:
    made = problem("float32", batch=(1, 2), q_len=5)
    call(made, text := made.spec.to_json())
    found = torch.ops.fuse.attention.default(made.operands, made.sizes, text, "reference")
    assert torch.equal(found, reference.attention(made.spec, made.operands, made.sizes, "eager"))


@pytest.mark.parametrize("missing", ["an operand", "a size", "a dimension"])
def test_a_call_that_is_no_kernels_own_is_an_error(missing: str) -> None:
    """A kernel would read what it was not given."""
    made = problem("float32", batch=(1, 2), q_len=5)
    call(made, text := made.spec.to_json())
    operands, sizes = list(made.operands), list(made.sizes)
    if missing == "an operand":
        operands.pop()
    elif missing == "a size":
        sizes.pop()
    else:
        operands[-1] = operands[-1][0]
    with pytest.raises(Exception, match="pack expected|sizes|unpack"):
        torch.ops.fuse.attention.default(operands, sizes, text, "cpp")


def test_a_torch_that_it_cannot_be_built_for_is_told(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(op, "_loaded", [])
    monkeypatch.setattr(op, "_SOURCES", (tmp_path / "op.cpp",))
    (tmp_path / "op.cpp").write_text("#error of another torch")
    op.load()
    assert not op._loaded and "of another torch" in caplog.text and "go through Python" in caplog.text


def test_tensors_that_are_laid_out_in_another_way_are_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(op, "_loaded", [])
    monkeypatch.setattr(op, "tensor_id", lambda x: 0)
    op.load()
    assert not op._loaded and "laid out in another way" in caplog.text


def test_what_was_forgotten_is_not_called() -> None:
    made = problem("float32", batch=(1, 2), q_len=5)
    call(made, text := made.spec.to_json())
    targets.reset()
    asked: list[str] = []
    original = targets.kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "kernel", lambda *given: asked.append(given[1]) or original(*given))
        call(made, text)
    assert asked == ["cpp"]


def test_calls_go_on_while_others_are_made_known() -> None:
    """A map that is replaced is still read by calls on other threads."""
    made = problem("float32", batch=(1, 2), q_len=5)
    expected, text = call(made, made.spec.to_json()), made.spec.to_json()
    run = targets.kernel(made.spec, "cpp")
    wrong: list[Tensor] = []

    def calls() -> None:
        wrong.extend(x for x in (call(made, text) for _ in range(300)) if not torch.equal(x, expected))

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        run.known_as(f"{text} {i}")  # type: ignore[attr-defined]
    for thread in threads:
        thread.join()
    assert not wrong
