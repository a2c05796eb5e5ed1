"""What `make docs` does beside MkDocs: files outside of docs/ that a page links to are part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    linked = {name for file in files.documentation_pages() for name in LINK.findall(file.content_string)}
    for name in sorted(linked):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **of_the_page: Any) -> str:
    return LINK.sub(r"](files/\1", markdown)
