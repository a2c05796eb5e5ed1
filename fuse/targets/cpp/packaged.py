"""A library for processes without Python: ``fuse::attention``, and the kernels of one program beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import fuse.templates
from fuse.ir.spec import AttentionSpec
from fuse.kernel.source import ENTRY
from fuse.targets.cpp import NAME
from fuse.targets.cpp.compiler import compile_library
from fuse.targets.cpp.launch import build
from fuse.targets.cpp.op import torch_command
from fuse.targets.cpp.plan import lse_dtype
from fuse.targets.cpp.render_backward import argument_count

_SOURCES = ("call.cpp", "packaged.cpp")
LIBRARY = "libfuse_attention.so"
_TABLE = """namespace {{

const std::vector<Packaged>& packaged() {{
    static const std::vector<Packaged> all = {{
        {}}};
    return all;
}}

}}  // namespace"""


def write(specs: Mapping[str, AttentionSpec], folder: Path) -> Path:
    """Writes LIBRARY, its source, and the kernels of ``specs``, by the text that calls give; the library's path.

    Raises BuildFailed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for text, spec in specs.items():
        source = build(spec).source
        for file in (source, source.with_suffix(".so")):
            shutil.copyfile(file, folder / file.name)  # whose permissions are for everybody
        rows.append(_row(text, spec, f"{source.stem}.so"))
    source, library = folder / "fuse_attention.cpp", folder / LIBRARY
    source.write_text(_source(rows))
    compile_library(torch_command(python=False), source, library)
    return library


def _row(text: str, spec: AttentionSpec, file: str) -> str:
    numbers = f"{argument_count(spec)}, {spec.batch}, {spec.v_dim}, {{{', '.join(map(str, spec.out_order))}}}"
    return f"{{{json.dumps(file)}, {json.dumps(text)}, {numbers}, {json.dumps(spec.out_dtype)}, {json.dumps(lse_dtype(spec))}}}"


def _source(rows: Sequence[str]) -> str:
    folder = Path(fuse.templates.__path__[0]) / "cpp"
    parts = [f"#define ENTRY {json.dumps(ENTRY)}", *((folder / name).read_text() for name in _SOURCES)]
    table = ",\n        ".join(rows)
    parts.append(_TABLE.format(table))
    return "\n".join([f"// {NAME} kernels for torch {torch.__version__}", *parts]) + "\n"
