"""C++ kernels of many specs in a few libraries: the compiler starts once for several, and reads headers once.

with together():
    kernels = [CppKernel(spec, build(spec)) for spec in specs]  # may be called when all is built: behind the block

What is built is what a user gets, text and flags; only that each kernel stands in a namespace of its own, and that ``narrow``
leaves instances out and optimises no more than for AVX2.
"""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fuse import targets
from fuse.kernel.source import ENTRY
from fuse.report.runs import Runs
from fuse.targets.cache import entry
from fuse.targets.cpp import compiler, cpu, launch, launch_backward, launch_weights
from fuse.targets.cpp.launch import Built
from fuse.targets.cpp.plan import MATRIX_UNITS, Plan

MANY = 8  # kernels of a library: more of them leave nothing to a second core
LANES = ("avx512", "avx2", "neon", "sse")  # instruction sets of the lanes core
PART = """#define {entry} {entry}_{number}
namespace part_{number} {{
#line 1 "{name}"
{text}
}}
#undef {entry}
#undef FUSE_WIDTH
#undef FUSE_DOUBLE
"""


@dataclass
class Kernel:
    """One that is wanted. ``run`` is there once its library is built."""

    name: str
    isa: str
    flags: tuple[str, ...]
    text: str
    run: Any = field(default=None, repr=False)

    @property
    def _as_parameter_(self) -> Any:
        """What ctypes takes for it where it is handed on."""
        return self.run

    def __call__(self, arguments: bytes) -> int:
        code: int = self.run(arguments)
        return code


def quick_flags(level: str = "-O2") -> dict[str, tuple[str, ...]]:
    """For every instruction set, optimised no more than that."""
    return {
        isa: tuple(min(flag, level) if flag[:2] == "-O" else flag for flag in flags)
        for isa, flags in compiler.ISA_FLAGS.items()
    }


@contextmanager
def together() -> Iterator[None]:
    """What ``build`` and ``build_backward`` are asked for inside is built at the end. Raises BuildFailed there."""
    wanted: list[Kernel] = []

    def later(name: str, isa: str, rendered: str) -> Built:
        kernel = Kernel(name, isa, compiler.ISA_FLAGS[isa], rendered)
        wanted.append(kernel)
        return Built(Path(name), kernel, Runs("kernel", Path(name)))

    with pytest.MonkeyPatch.context() as patch:
        for module in (launch, launch_backward):
            patch.setattr(module, "build_source", later)
        yield
    alike: defaultdict[tuple[str, ...], list[Kernel]] = defaultdict(list)
    for kernel in wanted:
        alike[kernel.isa, *kernel.flags].append(kernel)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_build, [k[i : i + MANY] for k in alike.values() for i in range(0, len(k), MANY)]))


def runs(isa: str) -> bool:
    """Whether kernels for an instruction set can be run here; matrix units are emulated beside AVX512-BF16."""
    if isa in MATRIX_UNITS:
        return cpu.matrix_unit() is not None
    return isa != "avx2" or compiler.instruction_set() not in ("neon", "sse")


@contextmanager
def narrow(vectors: int = 1, decode_queries: int = 0) -> Iterator[None]:
    """Blocks of the lanes core have no more vectors of queries, and decoding no way of its own: half as much to compile.

    For specs that say what an expression means: how it is written does not depend on either. So -O2 does, which AVX2 has.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "ISA_FLAGS", compiler.ISA_FLAGS | {isa: quick_flags()[isa] for isa in LANES})
        with _planned(
            lambda full: replace(full, vectors=vectors, decode_queries=decode_queries) if full.core == "lanes" else full
        ):
            yield


@contextmanager
def for_queries(count: int) -> Iterator[None]:
    """Kernels as they are planned, without the instances that no call of ``count`` queries takes."""

    def taken(full: Plan) -> Plan:
        few = full.decode_queries if count <= full.decode_queries else 0
        needed = max(1, -(-count // full.width))
        return replace(full, vectors=min(full.vectors, needed) if full.core == "lanes" else full.vectors, decode_queries=few)

    with _planned(taken):
        yield


@contextmanager
def _planned(change: Callable[[Plan], Plan]) -> Iterator[None]:
    """Plans are changed; kernels of other tests are as they are planned."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((launch, "plan"), (launch_backward, "backward_plan"), (launch_weights, "weights_plan")):
            planned = getattr(module, name)
            patch.setattr(module, name, lambda *of, planned=planned: change(planned(*of)))
        yield
    targets.reset()


def asked(request: pytest.FixtureRequest, test: Callable[..., object]) -> list[dict[str, Any]]:
    """The parameters of ``test`` in this run."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    return [item.callspec.params for item in items if getattr(item.function, "__code__", None) is test.__code__]


def _build(kernels: list[Kernel]) -> None:
    isa, flags = kernels[0].isa, kernels[0].flags
    command = (*compiler.cxx_compiler(), *compiler.FLAGS, *flags)
    build = partial(compiler.compile_library, command)
    library = entry("cpp", f"together_{isa}", ".cpp", _text(kernels), compiler.depends(command), build, ctypes.CDLL).loaded
    for number, kernel in enumerate(kernels):
        kernel.run = getattr(library, f"{ENTRY}_{number}")
        kernel.run.argtypes, kernel.run.restype = (ctypes.c_char_p,), ctypes.c_int


def _text(kernels: list[Kernel]) -> str:
    """Headers come first, outside of all namespaces, under the conditions that they have in the kernels."""
    head = [line for k in kernels for line in _headers(k.text)]
    parts = [PART.format(entry=ENTRY, number=n, name=k.name, text=k.text) for n, k in enumerate(kernels)]
    return "\n".join([*dict.fromkeys(head), *parts])


def _headers(text: str) -> list[str]:
    found = re.findall(r"^(?:#ifdef (__?\w+)[^\n]*\n)?(#include <.*>)$", text.split("#ifdef FUSE_STANDALONE")[0], re.M)
    return [f"#ifdef {condition}\n{header}\n#endif" if condition else header for condition, header in found]
