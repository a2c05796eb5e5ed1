"""options={"require": True}: attention that no kernel computes is an error at compile time."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fuse
from fuse import inner
from fuse.errors import NotFused
from fuse.report.reasons import ProbabilitiesUsed
from fuse.report.required import unfused
from fuse.report.runs import Runs
from fuse.report.site import Site


def attention(q: Tensor) -> Tensor:
    return (q @ q.mT / 4).softmax(-1) @ q


def with_scores(q: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ q.mT / 4
    return scores.softmax(-1) @ q, scores


def compiled(function: Callable[..., object], **options: object) -> Callable[..., object]:
    return torch.compile(function, backend="fuse", options={"inner": "eager", "require": True, **options})


def test_scores_that_are_returned_are_an_error_that_says_where_why_and_what_would_help() -> None:
    with pytest.raises(Exception, match="NotFused") as raised:
        compiled(with_scores)(torch.randn(2, 40, 16))
    text = str(raised.value)
    assert "1 of 1 attention sites of this graph have none" in text and "test_require.py" in text
    assert "ProbabilitiesUsed" in text and "to fuse it: use the weights that" in text


def test_it_is_raised_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*of: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(inner, "compiler", never)
    with pytest.raises(Exception, match="NotFused"):
        compiled(with_scores)(torch.randn(2, 40, 16))


def test_a_graph_without_attention_is_none() -> None:
    x = torch.randn(5, 4)
    assert torch.equal(compiled(torch.sin)(x), torch.sin(x))


@pytest.mark.compiler
def test_fused_attention_runs() -> None:
    q = torch.randn(2, 40, 16)
    torch.testing.assert_close(compiled(attention)(q), attention(q))


@pytest.mark.compiler
def test_a_step_of_training_waits_for_the_kernel_of_gradients() -> None:
    compiled(attention)(torch.randn(2, 40, 16, requires_grad=True))
    (site,) = fuse.report().sites
    assert site.runs["backward"].by == "kernel"


def test_plain_pytorch_in_the_place_of_a_kernel_is_an_error() -> None:
    with pytest.raises(Exception, match="computed by plain PyTorch: target 'reference' asks for it"):
        compiled(attention, target="reference")(torch.randn(2, 40, 16))


def test_a_device_without_kernels_is_an_error_where_there_is_attention_and_only_there() -> None:
    q = torch.empty(2, 40, 16, device="meta")
    assert compiled(torch.sin, target="cpp")(q).device.type == "meta"
    with pytest.raises(Exception, match="OtherDevice"):
        compiled(attention, target="cpp")(q)


def test_the_variable_counts_for_programs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
            return with_scores(q)

    program = torch.export.export(Model(), (torch.randn(2, 40, 16),))
    assert not fuse.transform(program).report.fused
    monkeypatch.setenv("FUSE_REQUIRE", "1")
    with pytest.raises(NotFused):
        fuse.transform(program)


def test_disable_wins() -> None:
    q = torch.randn(2, 40, 16)
    assert torch.equal(compiled(with_scores, disable=True)(q)[0], with_scores(q)[0])


LEFT = Site(False, ProbabilitiesUsed("x"), "model.py:7", "h.0")
SLOW = Site(True, None, "model.py:9", "h.1", runs={"forward": Runs("kernel"), "backward": Runs("reference", why="no way")})


def test_sites_alike_are_one_line_and_slow_gradients_are_told() -> None:
    other = Site(False, ProbabilitiesUsed("x"), "model.py:7", "h.3")
    first, second = map(str, unfused([LEFT, other, SLOW]))
    assert first.startswith("model.py:7 h.{0,3} (2 sites): ProbabilitiesUsed") and "to fuse it: use the weights" in first
    assert second == "model.py:9 h.1: its gradients are computed by plain PyTorch: no way"


def test_errors_of_fuse_go_from_process_to_process() -> None:
    error = NotFused(count=1, total=2, sites="x")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
