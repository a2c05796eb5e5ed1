"""The benchmark of GPUs goes its whole path on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_attention import CASES, PACKAGES, Case, Inputs, _visible, attention, way  # noqa: E402
from workers import Task, Worker, do_all  # noqa: E402


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--results", folder, "--workers", "2",
               "--peers", "math", "cudnn", "eager"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Attention backward, TFLOP/s" in (folder / "gpu-cpu.md").read_text()
    results: dict[str, Any] = json.loads((folder / "gpu-cpu.json").read_text())
    again = subprocess.run([*command, "--parts", "attention"], capture_output=True, text=True, timeout=300, env=env, check=True)
    results["again"] = json.loads((folder / "gpu-cpu.json").read_text()), again.stdout
    return results


@pytest.mark.compiler
@pytest.mark.models
def test_every_part_is_measured(found: dict[str, Any]) -> None:
    assert found["correctness"]["checked"] >= 3 and found["correctness"]["failed"] == []
    assert found["products"]["rate"] > 0
    for case in found["attention"]:
        assert case["error"] == "" and case["forward"].keys() == {"fuse", "math", "eager"}
        assert max(case["differences"].values()) < 1e-5
    assert found["attention"][0]["backward"].keys() == {"fuse", "math", "eager"}
    for model in found["models"]:
        assert model["error"] == "" and model["missing"] == {} and model["seconds"].keys() == {"sdpa, fuse"}


@pytest.mark.compiler
@pytest.mark.models
def test_a_second_run_goes_on_where_the_first_ended(found: dict[str, Any]) -> None:
    results, said = found["again"]
    assert results["attention"] == found["attention"] and "attention: " not in said
    assert results["correctness"]["right"] == found["correctness"]["right"]


@pytest.mark.compiler
@pytest.mark.models
def test_a_peer_that_is_missing_has_a_reason(found: dict[str, Any]) -> None:
    assert all(case["missing"].keys() == {"cudnn"} and case["missing"]["cudnn"] for case in found["attention"])


def _flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """What the packages document, (batch, length, heads, width), written out."""
    q, k, v = (t.transpose(1, 2).repeat_interleave(q.shape[2] // t.shape[2], 1) for t in (q, k, v))
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if alibi_slopes is None else scores - alibi_slopes[:, None, None] * (row - column).abs()
    hidden = (column > row) & causal | (column < row - window_size[0]) & (window_size[0] >= 0)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2), None


@pytest.mark.parametrize("kind", ["full", "causal", "window", "alibi", "soft-cap", "documents", "decode"])
@pytest.mark.parametrize("package", PACKAGES)
def test_flash_attn_is_asked_for_what_the_case_computes(package: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType(PACKAGES[package])
    module.flash_attn_func = _flash_attn_func
    monkeypatch.setitem(sys.modules, PACKAGES[package], module)
    case = Case(kind, 1536, 16, 4, 2, 2, 1 if kind == "decode" else 1536, "float32")
    x = Inputs.make(case, "cpu", gradients=False)
    torch.testing.assert_close(way(package, case, x)(), attention(kind, x))


def test_flash_attn_that_is_not_installed_is_missing() -> None:
    case = Case("causal", 64, 16, 4, 2, 2, 64, "float32")
    with pytest.raises(ModuleNotFoundError, match="flash_attn"):
        way("flash-attn", case, Inputs.make(case, "cpu", gradients=False))


def test_a_task_that_fails_hangs_or_dies_costs_only_itself() -> None:
    tasks = [
        Task("raises", eval, ("1 / 0",)), Task("dies", eval, ("__import__('os').abort()",)),
        Task("hangs", eval, ("__import__('time').sleep(60)",), seconds=3), Task("works", eval, ("6 * 7",)),
    ]  # fmt: skip
    raises, dies, hangs, works = do_all(tasks, 1, until=float("inf"))
    assert raises.error.startswith("ZeroDivisionError") and dies.error == "its process died"
    assert hangs.error == "no result within 3 s" and (works.value, works.error) == (42, "")


def test_no_task_begins_after_the_time_is_over() -> None:
    assert Worker().do(Task("late", eval, ("1",)), until=0).error == "not run: the time was over"


@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
def test_operations_are_those_of_visible_scores(kind: str) -> None:
    case = Case(kind, 2048, 64, 1, 1, 1, 2048)
    k = torch.arange(2048)
    seen = _visible(kind, k[:, None], k, k // 256).sum().item()
    assert case.operations == pytest.approx(4 * 64 * seen)


def test_every_kind_and_length_is_measured() -> None:
    asked = {(c.kind, c.width) for c in CASES}
    assert asked >= {
        (kind, width) for kind in ("full", "causal", "window", "alibi", "soft-cap", "documents") for width in (64, 128)
    }
    assert {c.kv_len for c in CASES} == {1024, 2048, 4096, 8192, 16384}
    assert any((c.heads, c.kv_heads) == (64, 8) and c.kind == "causal" for c in CASES)
