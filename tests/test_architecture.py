"""Imports go down the levels of the house, never back, and no target knows another; documents name what there is."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fuse
import fuse.passes

# From the ground up; what a module imports stands on its own level or below.
LEVELS = (
    ("errors", "settings", "memoize", "torch_private", "assumptions", "when_imported", "trainer", "failure", "report.paths"),
    ("ir",),
    ("report.reasons", "report.runs", "report.site", "report.wording", "report.formula", "report.excerpt", "report.notebook"),
    ("kernel",),
    ("targets",),
    ("parallel.layout", "parallel.plan", "parallel.option"),
    ("options",),
    ("ops",),
    ("parallel",),
    ("passes",),
    ("contents", "flex", "inner", "report.check", "report.listing", "report.required", "qualify"),
    ("backend", "alone", "channels", "dump_sites"),
    ("report",),
    ("transform", "library", "models"),
    ("bench",),
    ("inductor",),
    ("public",),
    ("", "cli", "__main__"),
)
FOLDERS = {"fuse": Path(fuse.__file__).parent, "fuse.passes": Path(fuse.passes.__file__).parent}


def modules() -> Iterator[tuple[str, Path]]:
    for name, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((name, *(p for p in parts if p != "__init__"))), file


MODULES = dict(modules())


def imported(file: Path) -> Iterator[str]:
    """The modules of fuse that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fuse":
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inside)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def level(module: str) -> int:
    """That of the longest name that fits."""
    inside = module.removeprefix("fuse").removeprefix(".")
    fitting = [(len(name), i) for i, names in enumerate(LEVELS) for name in names if f"{inside}.".startswith(f"{name}.")]
    assert fitting or not inside or inside == "templates", f"{module} has no level: give it one"
    return max(fitting)[1] if fitting else 0 if inside == "templates" else len(LEVELS) - 1


def test_imports_go_down_the_levels() -> None:
    up = [f"{m} -> {i}" for m, file in MODULES.items() for i in imported(file) if level(i) > level(m)]
    assert not up


def is_private(name: str) -> bool:
    """Neither Python's own names, __so__ and _so_, nor public ones."""
    return name.startswith("_") and not name.endswith("_")


def private_names(file: Path) -> Iterator[str]:
    """Those of others that a file uses: imported, or read of what is no object of its own."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            inside = getattr(node, "module", None) or ""
            names = [f"{inside}.{alias.name}".lstrip(".") for alias in node.names]
            yield from (n for n in names if n.startswith("torch.fx.experimental"))
            yield from (n for n in names if n.startswith("torch.") and any(map(is_private, n.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "attrgetter"):
            yield from (x.value for x in node.args if isinstance(x, ast.Constant) and is_private(str(x.value)))


def test_one_module_knows_what_is_private_to_torch() -> None:
    assert {module for module, file in MODULES.items() if any(private_names(file))} == {"fuse.torch_private"}


def test_no_target_knows_another() -> None:
    names = {m.split(".")[2] for m in MODULES if m.startswith("fuse.targets.") and (MODULES[m].name == "__init__.py")}
    across = [
        f"{m} -> {i}"
        for m, file in MODULES.items()
        for name in names
        if m.startswith(f"fuse.targets.{name}")
        for i in imported(file)
        for other in names - {name}
        if i.startswith(f"fuse.targets.{other}")
    ]
    assert not across


def test_only_the_registry_knows_a_target() -> None:
    """Nothing beside a target itself imports it, but for what lists the targets."""
    inside = ("fuse.targets.cpp", "fuse.targets.triton")
    known = {m for m, file in MODULES.items() if not m.startswith(inside) and any(i.startswith(inside) for i in imported(file))}
    assert known == {"fuse.targets.registry"}


# ------------------------------------------------------------------------------------------------------------ documents

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
TEXTS = sorted(
    f for folder in ("fuse", "passes", "templates") for end in ("py", "h", "jinja") for f in (ROOT / folder).rglob(f"*.{end}")
)
PATH = re.compile(r"(?<![\w/.~-])(?:fuse|passes|templates|tests|docs|examples|benchmarks)/[\w./*-]*[\w*/]")
LINK = re.compile(r"\]\((?!http)([^)#]+)")
MODULE = re.compile(r"`(fuse(?:\.\w+)+)`")


def missing(paths: set[str]) -> set[str]:
    """Of paths from the root, with stars, those that lead to nothing."""
    return {path for path in paths if not any(ROOT.glob(path.rstrip("/")))}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    linked = {target for target in LINK.findall(text) if not ((ROOT / document).parent / target).exists()}
    assert not missing(set(PATH.findall(text))) | linked


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_that_a_document_names_exists(document: str) -> None:
    for name in MODULE.findall((ROOT / document).read_text()):
        pkgutil.resolve_name(name)


def test_every_path_that_the_code_names_exists() -> None:
    named = {f"{file.relative_to(ROOT)}: {path}" for file in TEXTS for path in missing(set(PATH.findall(file.read_text())))}
    assert not named


def test_the_architecture_has_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = {str(f.parent.relative_to(ROOT)) for folder in ("fuse", "passes") for f in (ROOT / folder).rglob("__init__.py")}
    assert not {room for room in rooms if f"{room}/" not in text}
