"""Triton kernels compile for GPUs that are not there, fit them, and stay as small as they were: read off the machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fuse.targets.triton.plan import architecture

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.triton

SLACK = 1.03
SCRIPT = Path(__file__).with_name("compile_triton.py")
Kernels = dict[str, dict[str, Any]]


def run(*arguments: str) -> Kernels:
    """In a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=900, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: Kernels = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def budgets() -> Kernels:
    import triton

    path = SCRIPT.with_name("budgets") / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"
    if not path.exists():
        pytest.skip(f"no budgets for Triton {triton.__version__}: python {SCRIPT.name} --write-budgets")
    found: Kernels = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def found() -> Kernels:
    return run("--gated")


def test_no_kernel_for_nvidia_spills_registers(found: Kernels) -> None:
    assert {name: kernel["spills"] for name, kernel in found.items() if kernel["spills"] and ":sm_" in name} == {}


def test_shared_memory_fits(found: Kernels) -> None:
    limits = {name: architecture(name.split()[0].split(":")[2]).shared for name in found}
    assert {name: kernel["shared"] for name, kernel in found.items() if kernel["shared"] > limits[name]} == {}


def test_products_of_16_bits_use_hoppers_matrix_units(found: Kernels) -> None:
    hopper = {
        name: kernel["wgmma"]
        for name, kernel in found.items()
        if ":sm_90" in name and "/" not in name and ":float32" not in name and kernel["loops"]
    }
    assert hopper and all(hopper.values()), hopper


def test_no_kernel_exceeds_its_budget(found: Kernels, budgets: Kernels) -> None:
    over = [text for name, kernel in found.items() if (text := excess(kernel, budgets.get(name)))]
    assert over == [], f"if that is meant to be: python tests/{SCRIPT.name} --write-budgets"


def test_kernels_of_weights_fit() -> None:
    found = run(*(f"{name}@{width}/weights:bfloat16:{arch}" for name in ("causal", "dropout_causal_two_tiles")
                  for width in (64, 128) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")))  # fmt: skip
    assert {name: kernel["spills"] for name, kernel in found.items() if kernel["spills"] and ":sm_" in name} == {}
    assert all(kernel["shared"] <= architecture(name.split()[0].split(":")[2]).shared for name, kernel in found.items())
    assert len(found) == 16


def excess(kernel: dict[str, Any], budget: dict[str, Any] | None) -> str:
    """What a kernel takes more than it may; empty where nothing."""
    if budget is None:
        return "has no budget"
    if len(kernel["loops"]) != len(budget["loops"]):
        return f"loops {kernel['loops']}, budget {budget['loops']}"
    grown = [(n, b) for n, b in zip(kernel["loops"], budget["loops"], strict=True) if n > SLACK * b]
    grown += [(kernel[what], budget[what]) for what in ("shared", "spills") if kernel[what] > budget[what]]
    return ", ".join(f"{now}, budget {then}" for now, then in grown)


@pytest.mark.parametrize(
    ("change", "says"),
    [({}, ""), ({"loops": [510, 900]}, ""), ({"loops": [520, 900]}, "520, budget 500"), ({"loops": [500]}, r"loops [500]"),
     ({"shared": 1001}, "1001, budget 1000")],
)  # fmt: skip
def test_the_gate_tells_growth_from_noise(change: dict[str, Any], says: str) -> None:
    budget = {"spills": 0, "shared": 1000, "wgmma": True, "loops": [500, 900]}
    assert excess(budget | change, budget).startswith(says) and bool(excess(budget | change, budget)) == bool(says)
