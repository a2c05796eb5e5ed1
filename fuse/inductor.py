"""A second door: the passes as one of Inductor's own, for whoever cannot name another backend, and for AOTInductor."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

import fuse.passes
from fuse import backend
from fuse.inner import without_patterns
from fuse.ops import written
from fuse.options import resolve
from fuse.torch_private import CustomGraphPass, get_hash_for_files, inductor_config
from fuse.transform import rewrite


def inductor_configs() -> dict[str, Any]:
    """Options of torch._inductor.config under which Inductor, or AOTInductor, fuses attention.

    ``torch.compile(model, options=fuse.inductor_configs())``, ``torch._inductor.config.patch(fuse.inductor_configs())`` or
    ``aoti_compile_and_package(program, inductor_configs=fuse.inductor_configs())``.

    pre_grad_custom_pass     the passes; FUSE_TARGET and the devices of the tensors choose what computes attention
    pre_grad_pass_timing     "early": they run, and are told in ``fuse.report()``, also where torch's caches have the graph
    joint_custom_*_pass      keep Inductor's attention patterns, which are not sound, from what fuse declines
    """
    timing = {"pre_grad_pass_timing": "early"} if hasattr(inductor_config, "pre_grad_pass_timing") else {}
    return {"pre_grad_custom_pass": FusePass(), **timing, **without_patterns({})}


class FusePass(CustomGraphPass):
    """The passes on one graph; Inductor brings the graphs inside it by itself."""

    def __call__(self, graph: Graph) -> None:
        written.register()
        if isinstance(gm := graph.owning_module, GraphModule):
            backend.compiled.append(rewrite(gm, inside=False))

    def uuid(self) -> Any:
        """What the passes make of a graph depends on their source and on what the user has chosen."""
        return "fuse", _sources(), torch.__version__, repr(resolve(None, None))


@cache
def _sources() -> bytes:
    folders = (Path(__file__).parent, Path(fuse.passes.__file__).parent)
    return get_hash_for_files(tuple(sorted({str(file) for folder in folders for file in folder.rglob("*.py")})))
