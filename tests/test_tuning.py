"""Tuning: the fastest plan is taken, kept for later processes, and whatever lies on disk costs nobody a call."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from gradients import check, floats, run
from problems import Problem, problem

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

import triton_interpreter  # noqa: E402, F401  mends the interpreter
from triton.runtime.errors import OutOfResources  # noqa: E402

from fuse.__main__ import main  # noqa: E402
from fuse.targets import records  # noqa: E402
from fuse.targets.triton import tuning  # noqa: E402
from fuse.targets.triton.launch import TritonKernel  # noqa: E402
from fuse.targets.triton.launch_backward import TritonBackward  # noqa: E402
from fuse.targets.triton.plan import TritonPlan  # noqa: E402
from fuse.targets.triton.tuning import Subject, fastest, recorded  # noqa: E402

PLANS = tuple(TritonPlan(64, 64, block, 64, 4, 2) for block in (128, 64, 32, 16))
SUBJECT = Subject(Path("attention_bfloat16_64x64_0123.py"), "a GPU", (8, 8))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    return tmp_path / "triton"


class Bench:
    """Launches of plans with given times; of plans without one nothing fits."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.launched: list[int] = []

    def launch(self, plan: TritonPlan) -> None:
        if plan.block_q not in self.seconds:
            raise OutOfResources(1, 0, "shared memory")
        self.launched.append(plan.block_q)

    def clock(self, launch: Callable[[], None]) -> float:
        launch()
        return self.seconds[self.launched[-1]]


def test_the_fastest_plan_is_found_and_kept() -> None:
    bench = Bench({128: 3e-3, 64: 1e-3, 32: 2e-3, 16: 9e-3})
    assert fastest(SUBJECT, PLANS, bench.launch, bench.clock) == PLANS[1]
    assert recorded(SUBJECT, PLANS) == PLANS[1]


def test_plans_that_do_not_fit_are_left_out() -> None:
    bench = Bench({32: 2e-3, 16: 9e-3})
    assert fastest(SUBJECT, PLANS, bench.launch, bench.clock) == PLANS[2]


def test_it_is_an_error_if_no_plan_fits() -> None:
    bench = Bench({})
    with pytest.raises(OutOfResources):
        fastest(SUBJECT, PLANS, bench.launch, bench.clock)


@pytest.mark.parametrize(
    "other",
    [
        replace(SUBJECT, device="another GPU"),
        replace(SUBJECT, sizes=(8, 9)),
        replace(SUBJECT, kernel=Path("attention_4567.py")),
    ],
)
def test_a_result_belongs_to_one_kernel_device_and_magnitude(other: Subject) -> None:
    bench = Bench(dict.fromkeys((128, 64, 32, 16), 1e-3))
    fastest(SUBJECT, PLANS, bench.launch, bench.clock)
    assert recorded(other, PLANS) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fastest": 3}', '{"fastest": {"block_q": 64}}', "\0", "[" * 10**5])
def test_a_broken_file_is_ignored(text: str) -> None:
    SUBJECT.path.parent.mkdir(parents=True)
    SUBJECT.path.write_text(text)
    assert recorded(SUBJECT, PLANS) is None


@pytest.mark.parametrize("body", [{}, {"fastest": 3}, {"fastest": {"block_q": 64}}])
def test_a_file_that_says_something_else_is_ignored(body: dict[str, object]) -> None:
    records.write(SUBJECT.path, body)
    assert recorded(SUBJECT, PLANS) is None


def test_a_result_that_was_changed_is_measured_again() -> None:
    bench = Bench({128: 3e-3, 64: 1e-3})
    fastest(SUBJECT, PLANS, bench.launch, bench.clock)
    SUBJECT.path.write_text(SUBJECT.path.read_text().replace('"block_q": 64', '"block_q": 128'))
    assert recorded(SUBJECT, PLANS) is None


@pytest.mark.parametrize("there", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_ignored_and_makes_room(there: Callable[[Path], None]) -> None:
    SUBJECT.path.parent.mkdir(parents=True)
    there(SUBJECT.path)
    assert recorded(SUBJECT, PLANS) is None
    bench = Bench({32: 2e-3, 16: 9e-3})
    fastest(SUBJECT, PLANS, bench.launch, bench.clock)
    assert recorded(SUBJECT, PLANS) == PLANS[2]


def test_a_result_that_cannot_be_kept_costs_no_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file in the folder's place")
    bench = Bench({32: 2e-3, 16: 9e-3})
    with caplog.at_level(logging.WARNING, "fuse"):
        assert fastest(SUBJECT, PLANS, bench.launch, bench.clock) == PLANS[2]
    assert "not kept" in caplog.text and "FUSE_CACHE_DIR" in caplog.text


def test_a_plan_that_is_no_candidate_any_more_is_ignored() -> None:
    records.write(SUBJECT.path, {"fastest": asdict(replace(PLANS[0], stages=9))})
    assert recorded(SUBJECT, PLANS) is None


# --------------------------------------------------------------------------------------------------------- in kernels


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measurements, of which the second is the best."""
    taken: list[int] = []

    def clock(launch: Callable[[], None]) -> float:
        launch()
        taken.append(len(taken))
        return abs(taken[-1] - 1) + 1e-3

    monkeypatch.setattr(tuning, "seconds", clock)
    return taken


def made() -> Problem:
    return problem("float32", batch=(1, 1), q_len=40, qk_dim=16)


def test_a_kernel_is_tuned_by_its_first_call_and_right_all_along(measured: list[int], folder: Path) -> None:
    kernel = TritonKernel(made().spec)
    kernel.tune()
    for _ in range(2):
        made().check(kernel(made().operands, made().sizes))
    (result,) = folder.glob("tuned-*.json")
    assert len(measured) == len(json.loads(result.read_text())["measured"]) > 2


def test_a_later_process_reads_what_was_measured(measured: list[int], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    first = TritonKernel(made().spec)
    first.tune()
    first(made().operands, made().sizes)
    count = len(measured)
    (result,) = folder.glob("tuned-*.json")
    later, launched = TritonKernel(made().spec), []
    function = later.function

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: object, **constants: object) -> None:
                launched.append((constants["BM"], constants["BN"]))
                function[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(later, "function", Recorded())
    later(made().operands, made().sizes)
    best = json.loads(result.read_text())["fastest"]
    assert launched == [(best["block_q"], best["block_k"])] and len(measured) == count


def test_kernels_that_nobody_tunes_are_not_measured(measured: list[int]) -> None:
    TritonKernel(made().spec)(made().operands, made().sizes)
    assert measured == []


def test_the_option_tunes_what_a_model_launches(measured: list[int], folder: Path) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 0.25).softmax(-1) @ v

    inputs = [torch.randn(1, 2, 40, 16) for _ in range(3)]
    run = torch.compile(attention, backend="fuse", options={"target": "triton", "inner": "eager", "tune": True})
    torch.testing.assert_close(run(*inputs), attention(*inputs), rtol=1e-4, atol=1e-5)
    assert measured and len(list(folder.glob("tuned-*.json"))) == 1


def test_gradients_are_tuned_too_and_not_added_up(measured: list[int], folder: Path) -> None:
    problem = made()
    wanted = floats(problem)
    backward = TritonBackward(problem.spec, wanted)
    backward.tune()
    check(problem, run(problem, backward), wanted)
    assert len(measured) > 1 and len(list(folder.glob("tuned-*.json"))) == 1


@pytest.mark.parametrize(("train", "length"), [(False, 40), (True, 20)])  # kernels know what they chose for a magnitude
def test_the_command_says_what_it_measured(
    measured: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path, train: bool, length: int
) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "def build():\n"
        f"    x = torch.randn(1, 2, {length}, 16, requires_grad=True)\n"
        "    return lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v, (x, x, x)\n"
    )
    assert main(["tune", f"{tmp_path / 'model.py'}:build", *["--train"] * train]) == 0
    results, shown = list(folder.glob("tuned-*.json")), capsys.readouterr().out
    assert len(results) == 1 + train
    assert all(str(result) in shown for result in results) and "us by the fastest of" in shown


def test_the_command_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["tune", "gpt2"]) == 2
    assert capsys.readouterr().err.startswith("NoDevice")
