"""Triton kernels compile for GPUs that are not there, and fit them: read off the machine code."""

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

# Shared memory that one block may have, in bytes; AMD's is its local data share.
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}
ASKED = [
    *(f"{name}:bfloat16:{arch}" for name in ("causal", "mapped_bool") for arch in SHARED),
    *(f"{name}:bfloat16:90" for name in ("head_dim_80", "soft_cap_causal", "left_padding_and_causal", "relative_table")),
    "plain:float32:90", "plain:float16:80", "dropout:bfloat16:80",
]  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """Compiled in a process without the interpreter."""
    script = Path(__file__).with_name("compile_triton.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, *ASKED], capture_output=True, text=True, timeout=900, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return kernels


def test_no_kernel_spills_registers(found: dict[str, dict[str, Any]]) -> None:
    assert {name: f["spilled"] for name, f in found.items() if f.get("spilled")} == {}


def test_shared_memory_fits(found: dict[str, dict[str, Any]]) -> None:
    assert {name: f["shared"] for name, f in found.items() if f["shared"] > SHARED[name.split(":")[2]]} == {}


def test_products_of_16_bits_use_hoppers_matrix_units(found: dict[str, dict[str, Any]]) -> None:
    assert all(f["wgmma"] for name, f in found.items() if name.endswith("bfloat16:90"))
