"""The attention of a program as a library, for processes without Python, such as those that load a package of AOTInductor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fuse.errors import CannotWrite, NotPackaged
from fuse.ir.spec import AttentionSpec
from fuse.targets import registry
from fuse.targets.protocols import Packaging
from fuse.torch_private import OpOverload


def save_library(program: ExportedProgram | GraphModule, folder: str | Path) -> Path:
    """Writes the kernels of a program that ``fuse.transform`` has given, and a library that calls them; the library's path.

    A process without Python loads the library (``dlopen``) before the package that AOTInductor has made of the program; all
    other files of the folder have to lie beside it. It is for torch of this version, and processors like this one.

    Raises NotPackaged where the program calls something else than C++ kernels of one result, BuildFailed where no kernel can be
    built, CannotWrite where the folder cannot be written.
    """
    calls = list(_calls(program))
    if not calls:
        raise NotPackaged(found="no attention that was fused")
    target = registry.named(calls[0].target)
    if not isinstance(target, Packaging) or any(c.target != target.name for c in calls):
        raise NotPackaged(found=f"calls for the target {' and '.join(sorted({repr(c.target) for c in calls}))}")
    try:
        return target.package({c.text: AttentionSpec.from_json(c.text) for c in calls}, Path(folder))
    except OSError as error:
        remedy = "Choose another folder"
        raise CannotWrite(file=folder, why=error.strerror, remedy=remedy) from error


@dataclass(frozen=True)
class _Call:
    """The text of a spec, and who computes it."""

    text: str
    target: str


def _calls(program: ExportedProgram | GraphModule) -> Iterator[_Call]:
    graph = program.graph_module if isinstance(program, ExportedProgram) else program
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if isinstance(node.target, OpOverload) and node.target.namespace == "fuse":
                if node.target is not torch.ops.fuse.attention.default:
                    raise NotPackaged(found=f"a call of {node.target}")
                yield _Call(str(node.args[2]), str(node.args[3]))
