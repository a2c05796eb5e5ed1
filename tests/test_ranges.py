"""Interval arithmetic on tiles is sound: every result holds every value, proved by going through all small ranges."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fuse.targets.cpp.launch import compiler

pytestmark = pytest.mark.compiler

TEMPLATES = Path(__file__).parent.parent / "templates" / "cpp" / "prelude"


def test_every_value_lies_in_the_range_of_its_operation(tmp_path: Path) -> None:
    source, program = Path(__file__).with_name("ranges.cpp"), tmp_path / "ranges"
    command = [*compiler(), "-std=c++17", "-O1", "-w", f"-I{TEMPLATES}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
