"""A graph of little work runs operator by operator where that is faster than compiled, and the report says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace
from torch.utils.checkpoint import checkpoint

import fuse
from fuse import backend
from fuse.options import resolve
from fuse.qualify import faster
from fuse.qualify.verdict import Verdict
from fuse.qualify.whole import Contest, _step, is_little
from fuse.report.reasons import Slower


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def matrices(size: int = 4, grad: bool = True, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(1, 2, size, 8, device=device).requires_grad_(grad) for _ in range(3)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Sets what ways take, in seconds; each is called as often as it would be."""

    def set_times(*seconds: float) -> list[int]:
        asked: list[int] = []

        def in_turn(ways: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> tuple[float, ...]:
            asked.append(len([way() for way in ways]))
            return seconds

        monkeypatch.setattr(faster, "in_turn", in_turn)
        return asked

    return set_times


class Counted:
    """Attention that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Tensor) -> tuple[Tensor]:
        self.calls += 1
        return (attend(*args),)


def contest(compiled: Callable[..., Any], told: list[str], plain: Callable[..., Any] = attend) -> Contest:
    graph = symbolic_trace(lambda q, k, v: (plain(q, k, v),))
    return Contest(compiled, graph, "of a test", told.append)


@pytest.mark.parametrize(
    ("seconds", "left"), [((2e-4, 1e-4), True), ((1.04e-4, 1e-4), False), ((1e-4, 2e-4), False), ((4e-2, 2e-2), False)]
)
def test_the_faster_way_runs_from_the_first_call_on(
    timed: Callable[..., list[int]], seconds: tuple[float, float], left: bool
) -> None:
    """Of graphs that take long, what a graph costs by itself is no part to speak of: they are left to their sites' verdicts."""
    timed(*seconds)
    compiled, told = Counted(), list[str]()
    run = contest(compiled, told)
    args = matrices()
    first = run(*args)
    tried = compiled.calls
    assert torch.equal(run(*args)[0], first[0]) and (compiled.calls == tried) == left
    assert told == (["its graph, operator by operator: 0.1 ms, fuse 0.2 ms"] if left else [])


def test_what_was_decided_is_kept_for_the_same_graph_and_inputs(timed: Callable[..., list[int]]) -> None:
    asked, told = timed(2e-4, 1e-4), list[str]()
    for _ in range(2):
        contest(Counted(), told)(*matrices())
    assert len(asked) == 1 and len(told) == 2
    contest(Counted(), told)(*matrices(5))
    assert len(asked) == 2
    with torch.no_grad():  # which is another graph, of the same inputs
        contest(Counted(), told)(*matrices())
    assert len(asked) == 3


def test_a_call_without_gradients_is_tried_without_them() -> None:
    run = Counted()
    with torch.no_grad():
        assert not _step(run, matrices())
    assert len(_step(run, matrices())) == 3 and run.calls == 2


def test_trying_leaves_no_trace(timed: Callable[..., list[int]]) -> None:
    """Neither in gradients nor in the random numbers that the step draws."""
    timed(2e-4, 1e-4)
    run = contest(Counted(), [], lambda q, k, v: F.dropout(attend(q, k, v)))
    args, found = matrices(), []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(run(*args)[0])
    assert torch.equal(*found) and all(x.grad is None for x in args)


def test_a_graph_that_cannot_be_tried_runs_as_it_was_compiled(timed: Callable[..., list[int]]) -> None:
    timed(2e-4, 1e-4)

    def fails(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k[..., :3], v)

    told: list[str] = []
    assert torch.isfinite(contest(Counted(), told, fails)(*matrices())[0]).all() and not told


def test_nothing_is_tried_where_somebody_keeps_what_is_saved(timed: Callable[..., list[int]]) -> None:
    """A checkpoint counts it, and the step that runs again would have saved less."""
    asked, run = timed(2e-4, 1e-4), contest(Counted(), [])
    args = matrices()
    checkpoint(lambda *x: run(*x)[0], *args, use_reentrant=False).sum().backward()  # type: ignore[no-untyped-call]
    assert not asked and all(x.grad is not None for x in args)
    run(*args)
    assert asked


@torch.library.custom_op("fuse_tests::somebodys", mutates_args=())
def somebodys(x: Tensor) -> Tensor:
    return x.clone()


def traced(function: Callable[..., Tensor]) -> GraphModule:
    return symbolic_trace(lambda q, k, v: function(q, k, v))


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.mul_(2), v)


NOT_TRIED: dict[str, tuple[Callable[..., Tensor], Callable[[], Sequence[Any]]]] = {
    "more than can be copied in passing": (attend, lambda: matrices(2**17)),
    "another device": (attend, lambda: matrices(device="meta")),
    "a number that changes": (attend, lambda: [*matrices(), 3]),
    "it writes to an input": (written, matrices),
    "it calls what is not torch's": (lambda q, k, v: somebodys(attend(q, k, v)), matrices),
}


@pytest.mark.parametrize("name", NOT_TRIED)
def test_what_is_not_tried(name: str) -> None:
    function, inputs = NOT_TRIED[name]
    assert not is_little(traced(function), inputs())


def test_what_is_tried() -> None:
    assert is_little(traced(lambda q, k, v: attend(q, k, F.dropout(v)).transpose(1, 2).flatten(2) + 1), matrices())
    assert is_little(traced(attend), matrices(grad=False))


@pytest.mark.compiler
@pytest.mark.parametrize("left", [True, False])
def test_the_report_says_what_runs(left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "its graph, operator by operator: 0.1 ms, fuse 0.2 ms"
    found = Verdict("slower" if left else "kept", why)
    monkeypatch.setattr(Contest, "_timed", lambda self, args: found)
    monkeypatch.setattr(faster, "times", lambda *of: None)  # at the site nothing is known against its kernel
    args = matrices()
    compiled = torch.compile(attend, backend="fuse", options={"qualify": "once"})
    out = compiled(*args)
    (site,) = fuse.report().sites
    assert (isinstance(site.reason, Slower), site.fused) == (left, not left)
    assert (why in str(fuse.report())) == left
    assert torch.equal(out, attend(*args)) or not left


@pytest.mark.parametrize(
    "options",
    [{"qualify": "never"}, {"require": True}, {"verify": True}, {"target": "reference"}, {"inner": "aot_eager"}],
    ids=str,
)
def test_who_asks_for_more_than_speed_gets_it(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not backend._may_be_left(resolve(None, {"qualify": "once", **options}))
    assert backend._may_be_left(resolve(None, {"qualify": "once"}))
