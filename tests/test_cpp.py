"""Every named spec on the C++ target."""

from __future__ import annotations

import pytest
from specs import CASES

from fuse import runtime
from fuse.runtime.cpp import CppKernel

pytestmark = pytest.mark.compiler
DTYPES = ("float32", "bfloat16", "float16", "float64")


@pytest.fixture(scope="module", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """The kernels of all chosen tests at once, in parallel."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [item.callspec.params for item in items if item.originalname == "test_kernel_is_as_close_to_float64_as_eager"]
    runtime.prepare([CASES[p["name"]](p["dtype"]).spec for p in chosen], "cpp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_as_close_to_float64_as_eager(name: str, dtype: str) -> None:
    problem = CASES[name](dtype)
    kernel = runtime.kernel(problem.spec, "cpp")
    assert isinstance(kernel, CppKernel), "the kernel was not built"
    problem.check(kernel(problem.operands, problem.sizes))
