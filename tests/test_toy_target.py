"""A target that only tests know (toy_target.py): registered, it does all that a target does, and nothing else is told of it."""

from __future__ import annotations

import sys

import pytest
import torch
from specs import CASES, RANDOM_CASES
from torch import Tensor
from toy_target import ToyTarget

import fuse
from fuse import targets
from fuse.targets import kernel_or_reference, registry


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    registry.register(ToyTarget())


@pytest.mark.parametrize("name", [*CASES, *RANDOM_CASES])
def test_what_fuse_kernel_decides_is_all_that_a_target_needs(name: str) -> None:
    problem = {**CASES, **RANDOM_CASES}[name]("float32")
    kernel = targets.kernel(problem.spec, "toy")
    assert kernel.runs.by == "kernel", kernel.runs
    problem.check(kernel(problem.operands, problem.sizes))


def attention(x: Tensor) -> Tensor:
    """Causal."""
    return (x @ x.mT * 0.25).masked_fill(~torch.ones(32, 32).tril().bool(), -torch.inf).softmax(-1) @ x


def test_a_registered_target_can_be_chosen_and_its_kernel_runs() -> None:
    compiled = torch.compile(attention, backend="fuse", options={"target": "toy", "inner": "eager"})
    x = torch.randn(2, 3, 32, 16)
    torch.testing.assert_close(compiled(x), attention(x))
    (site,) = fuse.report().sites
    assert site.fused and site.mask == "k <= q"
    assert str(site.runs["forward"]) == f"kernel {site.kernels['toy']}"
    assert "k <= q" in site.kernels["toy"].read_text()


def test_what_a_target_does_not_compute_is_left_to_the_reference() -> None:
    compiled = torch.compile(attention, backend="fuse", options={"target": "toy", "inner": "eager"})
    x = torch.randn(2, 3, 32, 16, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="gradients .*: the toy computes results only"):
        grads = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(grads, torch.autograd.grad(attention(x).sum(), x))
    assert "gradients of 1 by the reference" in str(fuse.report())


def test_its_name_is_offered_where_another_was_misspelt() -> None:
    with pytest.raises(fuse.errors.InvalidOption, match="'reference', 'toy'.*Did you mean 'toy'"):
        fuse.Options(target="toi")


def test_what_a_target_has_to_import_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CASES["plain"]("float32").spec
    monkeypatch.setattr(ToyTarget, "forward", lambda self, spec: __import__("no_such_toy"))
    assert kernel_or_reference.forward(spec, "toy").runs.why == "No module named 'no_such_toy'"
    monkeypatch.setitem(sys.modules, "fuse.targets.triton.function", None)
    assert "pip install 'torch-fuse[triton]'" in kernel_or_reference.forward(spec, "triton").runs.why
