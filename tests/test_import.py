"""``import fuse`` waits for nothing, and whoever imports both has all that fuse registers with torch, in whatever order."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import fuse
from fuse import public

ROOT = Path(__file__).parents[1]
KNOWN = "assert torch.ops.fuse.attention and callable(fuse.report) and callable(fuse.explain)"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        f"import fuse, sys; assert 'torch' not in sys.modules; import torch; {KNOWN}",
        f"import torch, fuse; {KNOWN}",
        f"from fuse.report.site import Site; import fuse, torch; assert fuse.Site is Site; {KNOWN}",
        "from fuse.report.site import Site; import fuse; fuse.report()",
        "from fuse import *; report(); reset()",
    ],
)
def test_the_order_of_imports_does_not_matter(code: str) -> None:
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_version_and_unknown_names_cost_no_import_of_torch() -> None:
    done = python("import fuse, sys; fuse.__version__; hasattr(fuse, 'nothing'); dir(fuse); print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_what_is_public_is_known_to_type_checkers_by_the_same_names() -> None:
    assert fuse.__all__ == public.__all__ and set(fuse.__all__) <= set(dir(fuse))
    assert all(getattr(fuse, name) is getattr(public, name) for name in fuse.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert fuse.__version__ == metadata.version("torch-fuse")
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
