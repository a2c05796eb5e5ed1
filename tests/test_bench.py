"""fuse.bench: eager PyTorch, Inductor and fuse on one call."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse.bench import Case, Failed, Measured, Ways, worker
from fuse.bench.peak import peak_of
from fuse.bench.step import Step, relative_error
from fuse.cli import main
from fuse.errors import UnknownModel
from fuse.models import ModelCall

CPU = torch.device("cpu")
MODELS = Path(__file__).parent / "cli_models.py"


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(16, 48), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = nn.functional.dropout((q @ k.mT / 4).softmax(-1), self.dropout, self.training)
        return weights @ v


def made(dropout: float = 0.0) -> ModelCall:
    return ModelCall(Attention(dropout), (torch.randn(2, 40, 16),), {})


def breaks() -> ModelCall:
    raise ValueError("no model today")


def misnamed() -> ModelCall:
    raise UnknownModel(name="x", problem="there is none", hint="")


class Pipe:
    """Of a worker: what it is sent, and what it has answered."""

    def __init__(self, *sent: object) -> None:
        self.sent, self.answers = list(sent), []

    def recv(self) -> object:
        return self.sent.pop(0)

    def send(self, answer: object) -> None:
        self.answers.append(answer)


def served(way: str, *tasks: object) -> list[Any]:
    pipe = Pipe(*tasks, None)
    worker.serve(pipe, way)  # type: ignore[arg-type]
    return pipe.answers


@pytest.mark.compiler
def test_a_worker_measures_a_way_and_then_as_many_calls_as_it_is_asked_for(tmp_path: Path) -> None:
    case, exact = Case(made), tmp_path / "exact.pt"
    (eager, seconds) = served("eager", (case, exact), worker.CALL, "done")
    assert exact.exists() and 0 < seconds < 10 and eager.report is None and 0 < eager.error < 1e-5
    case = Case(made, options={"inner": "eager"})
    (ours, *times) = served("fuse", (case, exact), worker.CALL, worker.CALL, "done")
    assert ours.report.fused == 1 and 0 < ours.error < 1e-5 and len(times) == 2


def test_training_compares_gradients_and_random_numbers_are_not_compared(tmp_path: Path) -> None:
    def error(dropout: float, train: bool) -> float | None:
        file = tmp_path / f"{dropout}{train}.pt"
        (found,) = served("eager", (Case(made, (dropout,), train), file), "done")
        if file.exists() and train:
            assert len(torch.load(file)) == 3  # the result, and gradients of weight and bias
        assert isinstance(found, Measured)
        return found.error

    known = error(0.0, True)
    assert known is not None and 0 < known < 1e-5
    assert error(0.5, True) is None


def test_what_fails_is_told_and_the_worker_goes_on(tmp_path: Path) -> None:
    (failed, mistake, found) = served(
        "eager", (Case(breaks), tmp_path / "a"), (Case(misnamed), tmp_path / "b"), (Case(made), tmp_path / "c"), "done"
    )
    assert isinstance(failed, Failed) and failed.why.startswith("ValueError: no model today (test_bench.py:")
    assert isinstance(mistake, UnknownModel) and isinstance(found, Measured)


@pytest.mark.parametrize(
    ("results", "exact", "error"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0),
        ([[3.0, 4.0], [1.0]], [[3.0, 4.0], [0.0]], 0.2),
        ([[math.nan]], [[1.0]], math.nan),
        ([[1.0]], [[1.0, 2.0]], None),
        ([[1.0]], [[0.0]], None),
        ([], [], None),
    ],
)
def test_the_error_is_of_all_results_together(
    results: Sequence[list[float]], exact: Sequence[list[float]], error: float | None
) -> None:
    found = relative_error([torch.tensor(x) for x in results], [torch.tensor(x, dtype=torch.float64) for x in exact])
    assert found == error or pytest.approx(found, nan_ok=True) == error


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_the_peak_is_what_a_call_needs_beside_what_there_is() -> None:
    kept = torch.ones(2**24)
    found = peak_of(lambda: (kept.exp() + 1).sum(), CPU)
    assert found is not None and 0.9 < found / (2 * 2**26) < 1.3  # two tensors of 64 MB


def test_a_step_gives_the_same_gradients_in_every_process() -> None:
    torch.manual_seed(0)
    first, second = (Step(call, call.model, True)() for call in (made(), made()))
    assert len(first) == 3 and not torch.equal(first[1], second[1])  # other weights
    torch.manual_seed(0)
    assert torch.equal((lambda call: Step(call, call.model, True))(made())()[1], first[1])


@pytest.mark.compiler
def test_the_shell_shows_all_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"{MODELS}:causal", "--rounds", "1"]) == 0
    shown, steps = capsys.readouterr()
    ways = [line.split() for line in shown.splitlines()[1:4]]
    assert [way[0] for way in ways] == ["eager", "inductor", "fuse"] and all("e-" in line for line in shown.splitlines()[1:4])
    assert "1 attention site, 1 fused; " in shown and " of eager's time and " in shown
    assert steps.splitlines()[0] == "eager: first call …" and steps.splitlines()[-1] == "round 1 of 1 …"


def test_cold_ways_have_caches_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(worker, "serve", lambda pipe, way: seen.append(os.environ["FUSE_CACHE_DIR"]))
    monkeypatch.setattr(worker.signal, "signal", lambda *of: None)
    for name in ("FUSE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "warm")
    with warnings.catch_warnings():
        for caches in (None, tmp_path / "eager", tmp_path / "fuse"):
            worker.begin(Pipe(), "eager", caches)  # type: ignore[arg-type]
    assert seen == ["warm", f"{tmp_path}/eager/fuse_cache_dir", f"{tmp_path}/fuse/fuse_cache_dir"]


class Answers:
    """A worker that gives these, one after the other."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.told = list(answers), []

    def ask(self, what: object) -> object:
        return self.answers.pop(0)

    def tell(self, what: object) -> None:
        self.told.append(what)


def test_the_ways_take_turns_and_one_that_fails_in_between_sits_out() -> None:
    ways, first = Ways(), Measured(1.0, None, None)
    workers = {
        "eager": Answers(first, 1.0, 5.0, 3.0),
        "inductor": Answers(first, 9.0, Failed("died")),
        "fuse": Answers(first, 2.0, 2.0, 8.0),
    }
    ways._workers = workers  # type: ignore[assignment]
    steps: list[str] = []
    found = ways.compare(Case(made), rounds=3, say=steps.append)
    assert found.found["inductor"] == Failed("died") and found.seconds == {"eager": 3.0, "fuse": 2.0}
    assert [bool(worker.told) for worker in workers.values()] == [True, False, True]
    assert steps == ["eager: first call", "inductor: first call", "fuse: first call", *(f"round {n} of 3" for n in (1, 2, 3))]


def test_a_process_that_dies_is_a_way_that_failed(tmp_path: Path) -> None:
    with Ways() as ways:
        for each in ways._workers.values():
            each._process.kill()
        found = ways.compare(Case(made), rounds=1)
    assert all(isinstance(x, Failed) and "died" in x.why for x in found.found.values()) and not found.seconds
