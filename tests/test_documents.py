"""What README and docs say is so: their code runs, their output is what it prints, and their pages are built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import torch
from documents import ROOT, Captured
from markdown_it import MarkdownIt

import fuse
from fuse.options import CHOICES, VARIABLES
from fuse.torch_private import ShapeEnv

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
FIGURES = {"docs/architecture.md"}  # drawn by characters
# Blocks that only illustrate, by why they do not run.
ILLUSTRATE = {
    "README.md": ["any model"],
    "CONTRIBUTING.md": ["the tests themselves", "the tests themselves"],
    "docs/distributed.md": ["needs several processes"] * 2,
    "docs/tutorial.md": [
        "there is a compiler",
        "it takes half a minute",
        *["a model of yours"] * 6,
        "tests time nothing",
        "a model of yours",
        "needs a GPU",
        "needs a GPU",
    ],
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, or "" of an indented block; text)"""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    return [(token.info, token.content) for token in tokens if token.type in ("fence", "code_block")]


def runs(page: str) -> bool:
    return any(language in ("python", "console") for language, _ in blocks(page))


def skip_without_what_is_used_by(text: str) -> None:
    for used, package in (("from transformers import", "transformers"), ("Trainer(", "accelerate")):
        if used in text:
            pytest.importorskip(package)
    if "torch.export.export(" in text and not hasattr(ShapeEnv, "error_on_new_guards"):
        pytest.skip("this torch cannot keep the sizes of a program open")
    if "torch.distributed" in text and not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")


def run_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A user's folder, and another inner compiler than Inductor, whose results nobody prints."""
    patch.setenv("FUSE_INNER", "aot_eager")
    patch.setenv("FUSE_DUMP", "")  # an example sets it
    (folder / "examples").symlink_to(ROOT / "examples")
    patch.chdir(folder)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_code_that_nobody_runs(page: str) -> None:
    other = {language for language, _ in blocks(page)} - {"python", "text", "console"}
    assert other <= ({""} if page in FIGURES else set())


@pytest.mark.compiler
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)])
def test_a_page_prints_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    skip_without_what_is_used_by((ROOT / page).read_text())
    run_in(tmp_path, monkeypatch)
    assert documents.run(ROOT / page, monkeypatch, capfd) == ILLUSTRATE.get(page, [])


TOLD = """
```python
print("one", 1)
print("two", 22.5, "ms")
```

```text
one 1
two 7 ms
```
"""


def write(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_what_a_page_says_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    run_in(tmp_path, monkeypatch)
    documents.run(write(tmp_path, TOLD), monkeypatch, capfd)
    documents.run(write(tmp_path, TOLD.replace("one 1\n", "…\n")), monkeypatch, capfd)
    for other in ("one 2\n", "", "one 1\none 1\n"):
        with pytest.raises(AssertionError, match="page.md:7 says"):
            documents.run(write(tmp_path, TOLD.replace("one 1\n", other)), monkeypatch, capfd)


def test_a_command_of_a_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    run_in(tmp_path, monkeypatch)
    (tmp_path / "told.py").write_text("import os, sys\nprint(os.environ['TOLD'], sys.argv[1:])\n")
    page = "```console\n$ TOLD=1 python told.py 2 # three\n1 ['2']\n```\n"
    documents.run(write(tmp_path, page), monkeypatch, capfd)
    for other in (page.replace("1 ['2']", "1 ['3']"), page.replace("python", "ruby"), "```console\n$ make nothing\n```\n"):
        with pytest.raises(AssertionError):
            documents.run(write(tmp_path, other), monkeypatch, capfd)


MEASURING = {"quickstart", "report", "train_gpt"}  # whose output documents have as tables and pictures
SEVERAL = {"long_context"}  # started by torchrun


@pytest.mark.compiler
@pytest.mark.parametrize("name", sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - MEASURING - SEVERAL))
def test_an_example_prints_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    skip_without_what_is_used_by((ROOT / f"examples/{name}.py").read_text())
    run_in(tmp_path, monkeypatch)
    documents.run_example(Path(f"examples/{name}.py"), monkeypatch, capfd)


@pytest.mark.compiler
def test_the_training_example_has_eagers_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    run_in(tmp_path, monkeypatch)
    session = documents.Session(Path("examples/train_gpt.py"), monkeypatch, capfd)
    printed = session.shell("python examples/train_gpt.py --steps 3 --lengths --plot curves.svg")
    found = re.fullmatch(r"3 steps: losses are at most (\S+) apart; curves in curves.svg\n", printed)
    assert found and float(found[1]) < 1e-4
    assert Path("curves.svg").read_text().startswith("<svg")


@pytest.mark.compiler
def test_the_example_of_a_long_context_has_the_loss_and_gradients_of_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "examples/long_context.py")]
    chosen = ["--length", "160", "--masks", "window"]
    done = subprocess.run([*command, *chosen], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    found = re.findall(r"window .* KB sent   loss off by (\S+), gradients by (\S+)\n", done.stdout)
    assert len(found) == 4, done.stderr
    assert max(float(x) for row in found for x in row) < 2e-6
    assert done.stdout.endswith("4 attention sites, 4 fused\n")


def test_the_options_are_all_explained() -> None:
    text = (ROOT / "docs/options.md").read_text()
    assert not [name for name in CHOICES if f"\n## {name}\n" not in text]
    assert not [name for name in VARIABLES if f"`{name}" not in text]


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/api.md").read_text()
    shown = set(re.findall(r"^::: fuse\.([\w.]+)$", text, re.MULTILINE))
    assert {path.split(".")[-1] for path in shown} == set(fuse.__all__)


FETCHED = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?https?:""")


@pytest.mark.skipif(shutil.which("mkdocs", path=Path(sys.executable).parent) is None, reason="mkdocs is not installed")
def test_the_pages_are_built_without_a_warning_and_read_without_a_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {path.name for path in pages} >= {"index.html", "contributing.html", "api.html"}
    assert not [path for path in pages if FETCHED.search(path.read_text())]
