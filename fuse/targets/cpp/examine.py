"""What C++ kernels need of a machine, and what of its processor they use."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from fuse.errors import GET_COMPILER
from fuse.targets.cache import BuildFailed
from fuse.targets.cpp.compiler import command_for, cxx_compiler, instruction_set
from fuse.targets.protocols import Finding

_MEANS = {
    "amx": "AVX-512, and AMX for bfloat16", "avx512_bf16": "AVX-512, also for bfloat16",
    "avx512": "AVX-512; bfloat16 is computed as float32", "avx2": "AVX2; bfloat16 is computed as float32", "neon": "NEON",
    "sse": "SSE: no wider vectors were found, so that kernels are slow",
}  # fmt: skip
_OPENMP = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"


def examine() -> list[Finding]:
    isa = instruction_set()
    found = [Finding("vector instructions", _MEANS.get(isa, isa))]
    try:
        compiler = cxx_compiler()
    except BuildFailed as error:
        return [*found, Finding("C++ compiler", str(error).partition(". ")[0], GET_COMPILER)]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    found.append(Finding("C++ compiler", f"{compiler[0]}, {version.splitlines()[0]}" if version else compiler[0]))
    if _has_openmp(isa):
        return [*found, Finding("OpenMP", "kernels run on all threads")]
    remedy = "Install it (Debian, Ubuntu: apt install libgomp1, or libomp-dev for clang; macOS: brew install libomp)"
    return [*found, Finding("OpenMP", "the compiler has none, so that kernels run on one thread", remedy)]


def _has_openmp(isa: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text(_OPENMP)
        command = [*command_for(isa), "-fopenmp", str(source), "-o", str(source.with_suffix(".so"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
