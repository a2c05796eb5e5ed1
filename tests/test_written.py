"""Code that Inductor writes calls operators by names, each defined once with its formula, and names do what operators do."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, problem
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from fuse import targets
from fuse.ops import written
from fuse.targets import reference
from fuse.targets.cpp import op

pytestmark = pytest.mark.compiler


def qkv(*shape: int, wanted: bool = False) -> list[Tensor]:
    return [torch.randn(*shape).requires_grad_(wanted) for _ in range(3)]


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v, is_causal=True)


def code_of(model: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, str]:
    torch._dynamo.reset()
    result, code = run_and_get_code(torch.compile(model, backend="fuse", dynamic=False), *tensors)
    return result, "\n".join(code)


def test_the_spec_stands_once_above_with_its_formula() -> None:
    tensors = qkv(1, 2, 9, 16)
    result, code = code_of(two_layers, *tensors)
    calls = [line for line in code.splitlines() if " = attention_float32_16x16_" in line and "torch.ops" not in line]
    assert len(calls) == 2 and all(len(line) < 120 for line in calls)
    lines = code.splitlines()
    (defined,) = (i for i, line in enumerate(lines) if line.startswith("attention_float32_16x16_"))
    assert lines[defined - 1].startswith("# visible where") and "softmax over k of" in lines[defined - 2]
    torch.testing.assert_close(result, two_layers(*tensors))


def test_gradients_have_names_too() -> None:
    tensors = qkv(1, 2, 9, 16, wanted=True)
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, backend="fuse", dynamic=False)
    found, code = run_and_get_code(lambda: torch.autograd.grad(compiled(*tensors).square().sum(), tensors))
    text = "\n".join(code)
    assert text.count("\nattention_forward_float32_16x16_") == text.count("\nattention_backward_float32_16x16_") == 1
    torch.testing.assert_close(found, torch.autograd.grad(two_layers(*tensors).square().sum(), tensors), atol=1e-5, rtol=1e-5)


def branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, two_layers, F.scaled_dot_product_attention, (q, k, v))


def test_graphs_inside_a_graph_find_the_names() -> None:
    q, k, v = qkv(1, 2, 9, 16)
    for sign in (1.0, -1.0):
        result, code = code_of(branches, q.abs() * sign, k, v)
        assert code.count("\nattention_float32_16x16_") == 2
        torch.testing.assert_close(result, branches(q.abs() * sign, k, v))


def test_sizes_that_are_open_are_arguments() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, backend="fuse", dynamic=True)
    for length in (5, 9, 40):
        tensors = qkv(1, 2, length, 16)
        torch.testing.assert_close(compiled(*tensors), two_layers(*tensors))


def test_without_the_short_way_names_call_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_loaded", [])
    monkeypatch.setattr(op, "load", lambda: None)
    targets.reset()
    tensors = qkv(1, 2, 9, 24)
    result, code = code_of(two_layers, *tensors)
    assert "\nattention_float32_24x24_" in code
    torch.testing.assert_close(result, two_layers(*tensors))


PROGRAM = """
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
q = torch.arange(288.0).view(1, 2, 9, 16).sin()
compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend="fuse")
error = (compiled(q) - F.scaled_dot_product_attention(q, q, q, is_causal=True)).abs().max()
print(counters["inductor"]["fxgraph_cache_hit"], bool(error < 1e-5))
"""


def test_code_that_torch_has_kept_runs_in_a_new_process(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    said = [
        subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert [s.split() for s in said] == [["0", "True"], ["1", "True"]]


# ----------------------------------------------------------------------------------------------------- what a name does


@pytest.fixture
def made() -> Problem:
    """A problem whose kernel is known, so that a call goes the short way if it can."""
    op.load()
    assert op._loaded
    made = problem("float32", batch=(1, 2), q_len=5)
    torch.ops.fuse.attention.default(made.operands, made.sizes, made.spec.to_json(), "cpp")
    return made


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were called the long way."""
    taken: list[str] = []
    short = op.caller

    def counted(operator: str, text: str, target: str, way: Callable[..., Any]) -> Callable[..., Any]:
        return short(operator, text, target, lambda *given: taken.append(operator) or way(*given))

    monkeypatch.setattr(op, "caller", counted)
    written.caller.cache_clear()
    return taken


def name(of: Problem, operator: str = "attention") -> Callable[..., Any]:
    return written.caller(operator, of.spec.to_json(), "cpp")


def expected(of: Problem) -> Tensor:
    return reference.attention(of.spec, of.operands, of.sizes, "eager")


def test_results_are_the_operators(made: Problem, slow: list[str]) -> None:
    arguments = list(made.operands), list(made.sizes)
    assert torch.equal(name(made)(*arguments), torch.ops.fuse.attention.default(*arguments, made.spec.to_json(), "cpp"))
    found = name(made, "attention_forward")(*arguments)
    theirs = torch.ops.fuse.attention_forward.default(*arguments, made.spec.to_json(), "cpp")
    assert type(found) is tuple and all(
        torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(found, theirs, strict=True)
    )
    assert not slow


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]])
def test_gradients_are_the_operators(made: Problem, slow: list[str], wanted: list[bool]) -> None:
    operands, sizes, text = list(made.operands), list(made.sizes), made.spec.to_json()
    out, lse = name(made, "attention_forward")(operands, sizes)
    of_out = torch.randn_like(out)
    theirs = torch.ops.fuse.attention_backward.default(of_out, operands, sizes, out, lse, text, "cpp", wanted)
    found = name(made, "attention_backward")(of_out, operands, sizes, out, lse, wanted)
    assert type(found) is list and len(found) == sum(wanted) and all(map(torch.equal, found, theirs))
    assert not slow


class Seen(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operator(made: Problem, slow: list[str]) -> None:
    with Seen() as seen:
        found = name(made)(list(made.operands), list(made.sizes))
    assert "fuse::attention" in seen.names and slow
    torch.testing.assert_close(found, expected(made))


def test_a_profile_shows_the_operator(made: Problem) -> None:
    with profile() as measured:
        name(made)(list(made.operands), list(made.sizes))
    assert "fuse::attention" in {event.name for event in measured.events()}


def test_operands_that_want_a_gradient_get_it(made: Problem) -> None:
    leaves = [t.detach().requires_grad_() for t in made.operands]
    name(made)(leaves, list(made.sizes)).sum().backward()
    assert all(t.grad is not None for t in leaves)


def test_a_tangent_is_not_lost(made: Problem) -> None:
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in made.operands]
        assert forward_ad.unpack_dual(name(made)(duals, list(made.sizes))).tangent is not None


def test_examples_of_vmap_are_told_apart(made: Problem) -> None:
    many = [torch.stack([t, 2 * t]) for t in made.operands]
    found = torch.vmap(lambda *t: name(made)(list(t), list(made.sizes)))(*many)
    torch.testing.assert_close(found[0], expected(made))


class Marked(Tensor):
    pass


def test_subclasses_and_tensors_elsewhere_take_the_long_way(made: Problem, slow: list[str]) -> None:
    name(made)([t.as_subclass(Marked) for t in made.operands], list(made.sizes))
    elsewhere = name(made)([t.to("meta") for t in made.operands], list(made.sizes))
    assert elsewhere.device.type == "meta" and len(slow) == 2


@pytest.mark.parametrize("missing", ["an operand", "a size", "a dimension"])
def test_a_call_that_is_no_kernels_own_is_an_error(made: Problem, missing: str) -> None:
    operands, sizes = list(made.operands), list(made.sizes)
    if missing == "an operand":
        operands.pop()
    elif missing == "a size":
        sizes.pop()
    else:
        operands[-1] = operands[-1][0]
    with pytest.raises(Exception, match="pack expected|sizes|unpack"):
        name(made)(operands, sizes)


@pytest.mark.parametrize("given", [(), (1,), (1, 2), ([], []), ([None], [1]), (None, None, None)])
def test_arguments_that_are_none_are_an_error(made: Problem, given: tuple[Any, ...]) -> None:
    for operator in ("attention", "attention_forward", "attention_backward"):
        with pytest.raises(Exception, match="."):
            name(made, operator)(*given)


def test_a_size_that_is_no_number_of_64_bits_is_an_error(made: Problem) -> None:
    with pytest.raises(Exception, match="."):
        name(made)(list(made.operands), [*made.sizes[:-1], 2**70])


def test_nothing_is_kept_of_a_call_and_a_name_that_nobody_has_is_freed(made: Problem) -> None:
    operands, sizes = list(made.operands), list(made.sizes)

    def way(*given: Any) -> None: ...

    found = op.caller("attention", made.spec.to_json(), "cpp", way)
    before = [sys.getrefcount(x) for x in (operands, sizes, *operands)]
    for _ in range(100):
        found(operands, sizes)
        found(operands, [])
    assert [sys.getrefcount(x) for x in (operands, sizes, *operands)] == before
    gone = weakref.ref(way)
    del found, way
    gc.collect()
    assert gone() is None


def test_other_threads_run_while_a_kernel_does() -> None:
    op.load()
    made = problem("float32", batch=(8, 8), q_len=2048, kv_len=2048)
    arguments = list(made.operands), list(made.sizes)
    torch.ops.fuse.attention.default(*arguments, made.spec.to_json(), "cpp")
    running, turns = name(made), 0
    thread = threading.Thread(target=running, args=arguments)
    thread.start()
    while thread.is_alive():
        time.sleep(1e-3)
        turns += 1
    assert turns > 3
