"""Headers that kernels of tests are compiled with, read by the compiler once for all builds: with AVX-512 they are a third."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from fuse.targets.cache import BuildFailed
from fuse.targets.cpp import compiler

POISON = Path(__file__).with_name("poison.h")
# What templates/cpp/prelude/vector.h begins with
TEXT = f"""#include "{POISON}"
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif
"""


def header(folder: Path) -> Path:
    """The one to include: in ``folder``, with what gcc has read of it beside; by another compiler it is read each time."""
    try:
        command = compiler.cxx_compiler()
    except BuildFailed:
        return POISON
    stat = Path(command[0]).resolve().stat()
    facts = f"{TEXT}{POISON.read_text()}{command}{stat.st_mtime_ns}{compiler.processor()}"
    path = folder / f"headers-{hashlib.sha256(facts.encode()).hexdigest()[:16]}" / "tests.h"
    if not path.exists():
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            made.write_text(TEXT)
            if "Free Software Foundation" in version:
                _read(command, made, path.with_name(f"{path.name}.gch"))
            os.replace(made, path)
    return path


def _read(command: tuple[str, ...], source: Path, read: Path) -> None:
    """Leaves in the folder ``read`` what gcc makes of it for each instruction set; it takes the one whose flags are its own."""
    read.mkdir(exist_ok=True)
    for isa in {compiler.instruction_set(), *(["avx2"] if platform.machine().lower() in ("x86_64", "amd64") else [])}:
        flags = (*compiler.FLAGS, *compiler.ISA_FLAGS[isa], "-fopenmp", "-x", "c++-header")
        subprocess.run([*command, *flags, source, "-o", source.parent / isa], capture_output=True, check=False)
        with contextlib.suppress(OSError):
            os.replace(source.parent / isa, read / isa)
