"""Inductor's own attention patterns leave alone what fuse has declined: in every way a graph is compiled, and for no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.fx import Graph
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

import fuse
from fuse import inner
from fuse.targets import registry

pytestmark = pytest.mark.compiler
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
CHANGED = (
    "Inductor {}: its patterns of attention, or what they are made of, have changed. See which operator each of them holds now "
    "(torch/_inductor/fx_passes/fuse_attention.py), and hide that in fuse/inner.py."
)


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    with fresh_cache():
        counters.clear()
        yield


def over(dim: int, p: float = 0.0) -> Attention:
    """A softmax over another dimension than the keys', unless ``dim`` is -1."""
    return lambda q, k, v: dropout((q @ k.mT).div(2.0).softmax(dim), p, training=False) @ v


def square(grad: bool = False) -> list[Tensor]:
    return [torch.randn(4, 4, 8, 16, requires_grad=grad) for _ in range(3)]


def found_by_inductor() -> int:
    return counters["inductor"]["fuse_attention"]


def assert_left_alone(f: Attention, inputs: list[Tensor], **options: Any) -> None:
    """Neither fuse nor Inductor fuses ``f``; values and gradients are eager's."""
    fuse.reset()
    torch._dynamo.reset()
    results = []
    for call in (f, torch.compile(f, backend="fuse", options=options)):
        out = call(*inputs)
        results.append((out, *(torch.autograd.grad(out.square().sum(), inputs) if out.requires_grad else ())))
    assert fuse.report().recovered == 0
    assert found_by_inductor() == 0, CHANGED.format("replaced attention that fuse had declined")
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)  # another function is off by a tenth and more


DECLINED = {
    "over the queries": over(-2), "over heads": over(1), "over the batch": over(0), "dropout in evaluation": over(0, 0.2),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, grad",
    [("over the queries", False), ("over the queries", True), ("over heads", True), ("over the batch", False),
     ("dropout in evaluation", False), ("dropout in evaluation", True)],
)  # fmt: skip
def test_what_fuse_declined_stays_declined(name: str, grad: bool) -> None:
    """Inductor has patterns for inference and for training, with dropout and without; the dimension is none of them."""
    assert_left_alone(DECLINED[name], square(grad))


def test_inductor_alone_would_have_replaced_it_by_another_function() -> None:
    inputs, f = square(), over(-2)
    wrong = torch.compile(f, backend="inductor")(*inputs)
    assert found_by_inductor() == 1, CHANGED.format("does not fuse a softmax over the queries any more")
    assert not torch.allclose(wrong, f(*inputs))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_no_cache_hands_over_a_graph_that_was_compiled_with_the_patterns(grad: bool) -> None:
    inputs, f = square(grad), over(-2)
    torch.compile(f, backend="inductor")(*inputs)
    assert found_by_inductor()
    counters.clear()
    assert_left_alone(f, inputs)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_caches_are_used_again_and_right_when_they_are_warm(grad: bool) -> None:
    inputs, f = square(grad), over(-2)
    assert_left_alone(f, inputs)
    counters.clear()
    assert_left_alone(f, inputs)
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0


def test_other_uses_of_inductor_keep_its_patterns() -> None:
    """Before, between and after: nothing of the process is changed."""
    inputs = square()
    assert_left_alone(over(-2), inputs)
    want = over(-1)(*inputs)
    torch.testing.assert_close(torch.compile(over(-1), backend="inductor")(*inputs), want)
    assert found_by_inductor() == 1
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(over(-1), backend="fuse", options={"disable": True})(*inputs), want)
    assert found_by_inductor() == 2


def test_a_graph_that_fuse_does_not_look_at_keeps_the_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = replace(registry.named("cpp"), devices=frozenset({"cuda"}))  # as if the tensors were on another device
    monkeypatch.setitem(registry._targets, "cpp", elsewhere)
    inputs = square()
    torch.testing.assert_close(torch.compile(over(-1), backend="fuse")(*inputs), over(-1)(*inputs))
    assert found_by_inductor() == 1


def test_the_patterns_are_off_in_every_thread() -> None:
    failures: list[BaseException] = []

    def compile_in_thread() -> None:
        try:
            assert_left_alone(over(-2), square(True))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=compile_in_thread)
    thread.start()
    thread.join()
    assert not failures


def test_the_patterns_are_off_inside_checkpoints() -> None:
    assert_left_alone(lambda *x: checkpoint(over(-2), *x, use_reentrant=False), square(True))


class Count(CustomGraphPass):
    """How many exponentials a pass of the user's sees."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)))

    def uuid(self) -> str:
        return "count"


@pytest.mark.parametrize("globally", [False, True])
def test_passes_of_the_users_own_run_on_the_graph_as_it_is(globally: bool) -> None:
    passes = {"joint_custom_pre_pass": Count(), "joint_custom_post_pass": Count()}
    with torch._inductor.config.patch(passes if globally else {}):
        assert_left_alone(over(-2), square(), **({} if globally else passes))
    assert [p.seen for p in passes.values()] == [[1], [1]]


def test_graphs_are_not_cached_where_a_pass_has_no_id() -> None:
    """Nobody could tell whether it is the same one."""
    plain, hidden = torch.ops.aten.exp.default, torch.ops.fuse.exp.default
    known = inner.Rename(plain, hidden)
    assert inner.Passes(known, inner.Rename(hidden, plain)).uuid() is not None
    assert inner.Passes(known, lambda graph: None).uuid() is None
