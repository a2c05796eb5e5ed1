"""The backend between Dynamo and the inner compiler. The passes are stand-ins here: tests/test_passes.py has the real ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fuse
from fuse import backend, errors, inner, passes
from fuse.options import Options
from fuse.report.site import Reading, Site

SITE = Site(recovered=True, reason=None, where="model.py:7", module="h.0.attn", target="cpp")
Run = Callable[..., list[Site]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Sets what the passes do."""

    def instead(body: Run) -> None:
        monkeypatch.setattr(passes, "run", lambda gm, target, *_: Reading(tuple(body(gm, target))))

    return instead


def double(x: Tensor) -> Tensor:
    return torch.relu(x) * 2


def compiled(f: Callable[..., Any] = double, **options: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="fuse", options={"inner": "eager", **options})


def times(factor: float) -> Run:
    """A wrong rewrite of ``double``."""

    def rewrite(gm: GraphModule, *_: object) -> list[Site]:
        for node in gm.graph.nodes:
            if node.op == "call_function" and "mul" in node.name:
                node.args = (node.args[0], factor)
        gm.recompile()
        return [SITE]

    return rewrite


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)])
def test_every_inner_compiler_gives_values_and_gradients(run: Callable[[Run], None], inner: str) -> None:
    run(lambda gm, *_: [])
    x = torch.randn(5, requires_grad=True)
    y = compiled(inner=inner)(x)
    y.sum().backward()
    torch.testing.assert_close(y, double(x))
    torch.testing.assert_close(x.grad, 2.0 * (x > 0))


def test_sites_of_compiled_graphs_are_reported_until_reset(run: Callable[[Run], None]) -> None:
    run(lambda gm, *_: [SITE])
    compiled()(torch.randn(3))
    compiled(lambda x: x + 1)(torch.randn(3))
    assert fuse.report().sites == (SITE, SITE)
    fuse.reset()
    assert fuse.report().sites == ()


def test_a_failing_pass_costs_its_fusions_only(run: Callable[[Run], None], caplog: pytest.LogCaptureFixture) -> None:
    def fail(gm: GraphModule, *_: object) -> list[Site]:
        raise AssertionError("a defect")

    run(fail)
    x = torch.randn(3)
    with caplog.at_level(logging.WARNING, "fuse"):
        torch.testing.assert_close(compiled()(x), double(x))
    assert "a pass failed" in caplog.text and "a defect" in caplog.text


def test_an_error_of_the_inner_compiler_is_not_swallowed(run: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gm: GraphModule, example_inputs: Any) -> Any:
        raise ValueError("inner says no")

    run(lambda gm, *_: [SITE])
    monkeypatch.setattr(inner, "compiler", lambda *_, **__: broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="inner says no"):
        compiled()(torch.randn(3))
    assert fuse.report().sites == ()  # a graph that was never compiled has no sites


@pytest.mark.parametrize(("variable", "options"), [("1", {}), ("0", {"disable": True})])
def test_disable_runs_no_pass(
    run: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch, variable: str, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("FUSE_DISABLE", variable)
    run(times(3))
    x = torch.randn(3)
    torch.testing.assert_close(compiled(**options)(x), double(x))


def test_a_parameter_is_a_tensor_like_others() -> None:
    assert backend.is_read([torch.nn.Parameter(torch.randn(3)), 7], Options())
    assert backend.chooser(Options())(torch.device("cpu")) == "cpp"


def test_graphs_on_other_devices_are_left_alone_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fuse"):
        for _ in range(2):
            assert not backend.is_read([torch.empty(3, device="meta")], Options())
    assert caplog.text.count("tensors on meta run without fuse") == 1 and "to try" not in caplog.text


def test_a_graph_on_two_devices_is_fused_site_by_site(caplog: pytest.LogCaptureFixture) -> None:
    def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ x.mT).softmax(-1) @ x, (y @ y.mT).softmax(-1) @ y

    run = torch.compile(attend, backend="fuse", options={"inner": "eager"})
    x, y = torch.randn(2, 16, 8), torch.empty(2, 16, 8, device="meta")
    torch.testing.assert_close(run(x, y)[0], attend(x, y)[0])
    left, fused = sorted(fuse.report().sites, key=lambda site: site.recovered)
    assert fused.target == "cpp" and str(left.reason) == "there are no kernels for tensors on meta"


class Properties(NamedTuple):
    major: int
    minor: int
    gcnArchName: str = ""


@pytest.mark.parametrize(
    ("found", "hip", "target"),
    [
        (Properties(9, 0), None, "triton"), (Properties(7, 5), None, "triton"), (Properties(12, 1), None, "triton"),
        (Properties(7, 0), None, None), (Properties(13, 0), None, None), (Properties(9, 4, "gfx942:sramecc+"), "7.0", "triton"),
        (Properties(11, 0, "gfx1100"), "7.0", None),
    ],
)  # fmt: skip
def test_auto_is_triton_on_gpus_that_its_kernels_are_compiled_for(
    monkeypatch: pytest.MonkeyPatch, found: Properties, hip: str | None, target: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("fuse.targets.triton.target.find_spec", lambda name: name)
    assert backend.chooser(Options())(torch.device("cuda", 0)) == target


def test_auto_leaves_gpus_alone_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(9, 0))
    monkeypatch.setattr("fuse.targets.triton.target.find_spec", lambda name: None)
    assert backend.chooser(Options())(torch.device("cuda", 0)) is None


def test_the_warning_names_the_targets_that_have_kernels_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fuse"):
        backend._warn_of_devices(frozenset({"cuda"}), "cpp")
        backend._warn_of_devices(frozenset({"cuda"}), "auto")  # a GPU that auto does not take
    for target in ("cpp", "auto"):
        assert f"target {target!r} has kernels for cpu. For those there is target 'triton' to try." in caplog.text


def test_mode_and_options_reach_inductor() -> None:
    chosen = Options(mode="max-autotune-no-cudagraphs", inductor={"epilogue_fusion": False})
    made: Any = inner.compiler(chosen, patterns=True)
    assert made.config == {"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": False}


def test_a_wrong_option_is_refused_when_compiling() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Did you mean 'inner'") as failure:
        compiled(iner="eager")(torch.randn(3))
    assert isinstance(failure.value.inner_exception, errors.UnknownOption)


def test_verify_finds_a_wrong_rewrite_and_names_its_sites(run: Callable[[Run], None]) -> None:
    run(times(3))
    with pytest.raises(errors.VerificationFailed, match=r"relative error 0\.5.*model\.py:7"):
        compiled(verify=True)(torch.ones(3))


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_verify_finds_infinities_and_nan_where_eager_has_numbers(run: Callable[[Run], None], wrong: float) -> None:
    run(times(wrong))
    with pytest.raises(errors.VerificationFailed, match="relative error inf"):
        compiled(verify=True)(torch.ones(3))


def test_verify_lets_right_graphs_through_once_only(run: Callable[[Run], None]) -> None:
    def counting(x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return torch.softmax(x * count, -1)

    run(lambda gm, *_: [SITE])
    x, count = torch.randn(3), torch.zeros(1)
    torch.testing.assert_close(compiled(counting, verify=True)(x, count), torch.softmax(x, -1))
    assert count.item() == 1


def test_verify_does_not_judge_random_graphs(run: Callable[[Run], None]) -> None:
    run(times(3))
    compiled(lambda x: torch.nn.functional.dropout(x, 0.5) * 2, verify=True)(torch.ones(64))


def test_a_bool_output_and_nan_are_compared_as_they_are(run: Callable[[Run], None]) -> None:
    run(lambda gm, *_: [SITE])
    y, positive = compiled(lambda x: (torch.log(x), x > 0), verify=True)(torch.tensor([-1.0, 0.0, 2.0]))
    assert y.isnan().tolist() == [True, False, False] and positive.tolist() == [False, False, True]
