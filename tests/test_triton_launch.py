"""Launches: what was compiled is found again, by everything that it depends on, in little time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """(kernels that were loaded, launches) of calls in a process without the interpreter."""
    script = Path(__file__).with_name("launch_triton.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def test_a_kernel_is_loaded_once_and_launched_by_every_call(found: dict[str, Any]) -> None:
    assert found["first"] == [1, 1] and found["again"] == [0, 1]


def test_another_size_of_the_same_divisibility_takes_the_same_kernel(found: dict[str, Any]) -> None:
    assert found["other size"] == [0, 1]


def test_a_tensor_that_is_not_aligned_gets_a_kernel_of_its_own(found: dict[str, Any]) -> None:
    assert found["misaligned"] == [1, 1]


@pytest.mark.parametrize("kind", ["loaded", "copied"])
def test_a_call_with_meta_tensors_compiles_what_a_later_call_launches(kind: str, found: dict[str, Any]) -> None:
    """Be tiles loaded, or copied by tensor descriptors."""
    assert found[f"{kind}, meta"] == [1, 0] and found[f"{kind}, cpu"] == [0, 1]


def test_what_triton_cannot_compile_is_left_to_the_reference_with_one_warning_of_each_kind(
    found: dict[str, Any],
) -> None:
    same, (forward, backward) = found["refused"]
    assert same and all("PassManager::run failed" in warning for warning in (forward, backward))
    assert "attention without its kernels" in forward and "gradients" in backward


def test_a_plan_that_a_device_has_no_resources_for_gives_way_to_the_next(found: dict[str, Any]) -> None:
    (shared,) = found["shared"]
    assert shared <= 24 * 1024


@pytest.mark.parametrize(("spills", "loaded", "rows"), [("none", 1, 0), ("two", 3, 2), ("all", 3, 2), ("more and more", 3, 0)])
def test_a_plan_that_spills_gives_way_to_one_that_spills_less(
    spills: str, loaded: int, rows: int, found: dict[str, Any]
) -> None:
    """``rows``: by the number of the plan that is taken, and stays."""
    (first, again), blocks = found["spilling"][spills], found["plans"]
    assert first == [loaded, blocks[rows]] and again == [0, blocks[rows]]


def test_what_a_graph_will_launch_is_compiled_beforehand(found: dict[str, Any]) -> None:
    """Forward and the three kernels of gradients; two attentions that are alike share them."""
    by_backend, by_step = found["compiled beforehand"]
    assert by_backend == [4, 0] and by_step[0] == 0 and by_step[1] >= 8


def test_a_kernel_that_a_device_does_not_run_is_refused(found: dict[str, Any]) -> None:
    """Whatever an answer before it has left in memory: the result and the gradients of two problems."""
    assert [finding[:9] for finding in found["not launched"] if "of the result" in finding] == ["error inf"] * 2
    assert len(found["not launched"]) == 8


def test_products_and_sums_become_one_instruction_whatever_tritons_default(found: dict[str, Any]) -> None:
    assert found["fused sums"] == 1


def test_a_launch_costs_little_on_the_host(found: dict[str, Any]) -> None:
    """By what Python calls for it, which does not depend on the machine as its time does."""
    assert found["calls"] < 120


def test_tritons_own_launcher_gives_the_driver_every_parameter_in_its_place(tmp_path: Path) -> None:
    """And tensor maps that a device would take. The driver is one without a device."""
    here = Path(__file__).parent
    build = ["cc", "-shared", "-fPIC", "-w", "-o", tmp_path / "libcuda.so.1", here / "fake_cuda.c"]
    subprocess.run(build, check=True)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    script = [sys.executable, here / "launch_fake_cuda.py"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["wrong"] == [] and facts["refused"] == 0
    assert facts["launches"] > 60 and facts["maps"] > 40
