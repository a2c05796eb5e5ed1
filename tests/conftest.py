"""Tiers: what a test needs beyond torch. ``pytest -m "not compiler and not models"`` is the tier that needs nothing."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Triton decides when it is imported, which torch may do; tests that compile kernels do so in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
# Inductor starts processes to compile in, each of which imports torch: more than the few graphs of a test take.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Without a cache Inductor builds a program for each set of vector instructions, to see whether the compiler knows them: as
# many seconds as a test of it takes.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch
import torch._dynamo.guards
from headers import header
from together import quick_flags

import fuse
from fuse.targets import fallback_warnings
from fuse.targets.cpp import compiler

# Else pytest attaches its handler to this logger, which turns on torch's traces: slow, and shown with every failure.
logging.getLogger("torch.__trace").propagate = True
# torch keeps what it prints itself from the root's handlers, pytest's among them.
logging.getLogger("fuse").propagate = True

# Compiling a graph makes many objects and few cycles: looking for them as often as Python does takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)
# Dynamo empties the processor's caches to measure how long the guards of every graph take, which it only logs: a seventh of
# the time of small programs.
torch._dynamo.guards.profile_guard_manager = lambda *of: 0.0

pytest_plugins = ["models.table"]  # here, since the process that prints it collects no tests of its own
DAYS_KEPT = 7  # kernels of earlier runs: what has changed since leaves its own behind
# Of `make sanitize`: what a kernel reads or writes beside its operands, and what C++ does not define, ends the process.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1") if "FUSE_TEST_SANITIZE" in os.environ else ()
CXX = shutil.which("g++") or shutil.which("clang++")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiler: needs a C++ compiler")
    config.addinivalue_line("markers", "triton: needs Triton, which is not there for every platform")
    config.addinivalue_line("markers", "models: needs transformers, and minutes")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _forget_old_kernels()
        header(_kept())  # before workers need it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gc.freeze()  # modules stay: Dynamo collects after each graph, and would go through all of them
    items.sort(key=lambda item: item.path.name != "test_triton_compile.py")  # minutes in one step: beside the others, not after
    if CXX is None:
        for item in items:
            if item.get_closest_marker("compiler"):
                item.add_marker(pytest.mark.skip(reason="no C++ compiler"))


@pytest.fixture(scope="session", autouse=True)
def private_cache() -> Iterator[Path]:
    """Kernels of a test run never come from, or go to, the cache of the user who runs it.

    They are kept for the next run: a kernel is named by all that it is made of. FUSE_TEST_CACHE=DIR is another place for them.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = _kept()
        folder.mkdir(parents=True, exist_ok=True)
        patch.setenv("FUSE_CACHE_DIR", str(folder))
        patch.setattr(compiler, "FLAGS", (*compiler.FLAGS, *SANITIZERS, "-include", str(header(folder))))
        patch.setenv("FUSE_QUALIFY", "never")  # tests of qualification ask for it: others are of kernels, be they fast or not
        yield folder


@pytest.fixture(scope="module", autouse=True)
def optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels are optimised as a user's in the tests of C++ kernels, elsewhere as AVX2's are on every machine: a third less."""
    with pytest.MonkeyPatch.context() as patch:
        if SANITIZERS or not request.path.name.startswith("test_cpp"):
            patch.setattr(compiler, "ISA_FLAGS", quick_flags("-O1" if SANITIZERS else "-O2"))
        yield


def _kept() -> Path:
    return Path(os.environ.get("FUSE_TEST_CACHE") or Path(__file__).parent.parent / "build" / "test-cache")


def _forget_old_kernels() -> None:
    before = time.time() - DAYS_KEPT * 24 * 3600
    for file in _kept().rglob("*"):
        if file.is_file() and file.stat().st_mtime < before:
            file.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No test sees what another compiled, or its random numbers, or misses a warning that another has had."""
    torch.manual_seed(0)
    fallback_warnings.reset()
    torch._dynamo.reset()
    fuse.reset()
