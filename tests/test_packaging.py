"""What a user installs: the wheel, in an environment that has torch and has never seen this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("fuse", "passes", "templates", "torch_fuse_logs.py", "pyproject.toml", "README.md", "LICENSE")

USE = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

q = torch.randn(1, 2, 64, 16)
with torch.no_grad():
    got = torch.compile(sdpa, backend="fuse", options={"inner": "aot_eager"})(q, q, q)
torch.testing.assert_close(got, sdpa(q, q, q))
print(sys.modules["fuse"].__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel installed, torch borrowed from this one."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    # A path in a .pth file is searched last, and .pth files in it, such as that of an editable fuse, are not read.
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    return python


def pip(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_passes_templates_types_and_license(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    templates = (".py", ".jinja", ".h", ".cpp", ".css", ".js")
    for folder, suffixes in (("fuse", (".py", ".typed")), ("passes", (".py",)), ("templates", templates)):
        files = [f for f in (ROOT / folder).rglob("*") if f.suffix in suffixes or f.name == "py.typed"]
        assert files
        prefix = Path("fuse") if folder == "fuse" else Path("fuse") / folder
        missing = {str(prefix / f.relative_to(ROOT / folder)) for f in files} - inside
        assert not missing
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fuse", "torch_fuse_logs.py"}


@pytest.mark.compiler
def test_the_installed_backend_is_found_by_name_without_importing_fuse(clean_python: Path, tmp_path: Path) -> None:
    done = subprocess.run([clean_python, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(clean_python.parents[1])


def test_the_installed_program_has_the_version_of_the_wheel(clean_python: Path, wheel: Path, tmp_path: Path) -> None:
    program = clean_python.with_name("torch-fuse")
    done = subprocess.run([program, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"torch-fuse {wheel.name.split('-')[1]}\n", done.stderr


def test_the_backend_is_one_entry_point() -> None:
    (entry,) = {e.value for e in entry_points(group="torch_dynamo_backends", name="fuse")}
    assert entry == "fuse.backend:fuse"


def test_every_pin_names_a_package_and_one_version() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(len(pin.split("==")) == 2 and "+" not in pin for pin in pins)
