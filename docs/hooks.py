"""What `make docs` does beside MkDocs: README is the first page, and files outside of docs/ that pages link to come along."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()(?!http|#)[^)#\s]+")


def on_files(files: Files, config: Any) -> Files:
    linked: set[str] = set()
    for page in files.documentation_pages():
        linked.update(LINK.findall(placed(page.content_string, "docs")))
    for name, page in PAGES.items():
        text = placed((ROOT / name).read_text(), "")
        linked.update(LINK.findall(text))
        files.append(File.generated(config, page, content=text))
    for name in sorted(name.removeprefix("files/") for name in linked if name.startswith("files/")):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **of_mkdocs: Any) -> str:
    return markdown if page.file.src_uri in PAGES.values() else placed(markdown, "docs")


def placed(text: str, folder: str) -> str:
    """``text`` of a file in ``folder`` with its links as they are on the site."""
    return LINK.sub(lambda link: _on_site(PurePosixPath(folder, link[0])), text)


def _on_site(path: PurePosixPath) -> str:
    inside = (ROOT / path).resolve().relative_to(ROOT).as_posix()
    return PAGES.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else f"files/{inside}")
