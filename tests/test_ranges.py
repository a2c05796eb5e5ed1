"""Interval arithmetic of C++ kernels is sound, and as sharp as it should be: every case of the shared suite."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from interval_cases import INTEGERS, NAMES, REALS, Case, Library, check, written
from torch import Tensor

from fuse.ir.expr import FLOATS
from fuse.ir.interval import Range
from fuse.targets.cpp.compiler import cxx_compiler
from fuse.targets.cpp.ranges import CppRanges

pytestmark = pytest.mark.compiler

TEMPLATES = Path(__file__).parent.parent / "templates"


TYPES = {"bool": "Truth", **dict.fromkeys(FLOATS, "RealRange")}


def cpp_function(name: str, case: Case) -> str:
    writer = CppRanges(pytest.fail, [0])
    result = written(writer, case)
    types = [TYPES.get(s, "IntRange") for s in case.sources]
    ranges = [f"const {t} {n} = range_at<{t}>(from[{i}], i);" for i, (t, n) in enumerate(zip(types, NAMES, strict=False))]
    body = "\n        ".join([*ranges, *writer.found.lines, f"put(to, i, {result});"])
    head = f'extern "C" void {name}(long n, const void* const* from, void* to) {{'
    return f"{head}\n    for (long i = 0; i < n; i++) {{\n        {body}\n    }}\n}}\n"


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("ranges")
    source, library = folder / "cases.cpp", folder / "cases.so"
    names = {case: f"case_{i}" for i, case in enumerate(dict.fromkeys((*INTEGERS, *REALS)))}
    functions = [cpp_function(name, case) for case, name in names.items()]
    source.write_text("\n".join([Path(__file__).with_name("ranges.cpp").read_text(), *functions]))
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{TEMPLATES / 'cpp' / 'prelude'}"]
    subprocess.run([*cxx_compiler(), *flags, str(source), "-o", str(library)], check=True, timeout=300)
    loaded = ctypes.CDLL(str(library))

    def run(case: Case, args: Sequence[Range]) -> Range:
        given = [_packed(r) for r in args]
        to = torch.empty(len(given[0]), *((3,) if case.dtype in FLOATS else (2,)), dtype=_word(case.dtype))
        pointers = (ctypes.c_void_p * len(given))(*(t.data_ptr() for t in given))
        getattr(loaded, names[case])(ctypes.c_long(len(to)), pointers, ctypes.c_void_p(to.data_ptr()))
        nan = to[:, 2] != 0 if case.dtype in FLOATS else torch.zeros(len(to), dtype=torch.bool)
        wide = to.double() if case.dtype in FLOATS else to
        return Range(wide[:, 0], wide[:, 1], nan)

    return run


def _word(dtype: str) -> torch.dtype:
    return torch.float32 if dtype in FLOATS else torch.int64


def _packed(r: Range) -> Tensor:
    ends = [r.low, r.high, r.nan.double()] if r.low.is_floating_point() else [r.low, r.high]
    return torch.stack(ends, -1).to(torch.float32 if r.low.is_floating_point() else torch.int64).contiguous()


@pytest.mark.parametrize("case", [*INTEGERS, *REALS], ids=str)
def test_cpp_ranges_hold_all_values(case: Case, in_cpp: Library) -> None:
    check(case, in_cpp)
