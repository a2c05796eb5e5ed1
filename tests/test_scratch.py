"""A thread keeps what a small call of a kernel needed for its next one, and gives back what a large one did."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import fuse.templates
from fuse.targets.cpp import compiler

HEADER = Path(fuse.templates.__path__[0]) / "cpp" / "prelude" / "scratch.h"
PROGRAM = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
static int freed = 0;
static void counted(void* p) { freed += p != nullptr, free(p); }
#define free counted
{header}
template <int PART> static char* of(int64_t bytes) { return Memory<PART>(bytes).data; }
int main() {
    char* const first = of<0>(4096);
    printf("kept %d apart %d", of<0>(64) == first && !freed, of<1>(64) != first);
    of<0>(2 * MOST_KEPT);
    printf(" grown %d", freed == 2);
    printf(" none %d\\n", of<0>(INT64_MAX / 2) == nullptr && of<0>(64) != nullptr);
}
"""


@pytest.mark.compiler
def test_a_call_takes_the_memory_of_the_one_before_but_for_a_large_one(tmp_path: Path) -> None:
    source, binary = tmp_path / "scratch.cpp", tmp_path / "scratch"
    source.write_text(PROGRAM.replace("{header}", HEADER.read_text()))
    subprocess.run([*compiler.cxx_compiler(), "-std=c++17", "-O2", str(source), "-o", str(binary)], check=True, timeout=300)
    found = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    assert found == "kept 1 apart 1 grown 1 none 1\n"
