"""Compiles Triton kernels for GPUs that need not be there, and prints what can be read off the code as JSON.

python compile_triton.py NAME[@WIDTH][/PARTS]:DTYPE:ARCH …
    a named spec with its own head dimension, or with WIDTH; by the forward kernel, with PARTS by those of decoding, and with
    the word "backward" in the place of PARTS by those of gradients, "map" by the one of its map of tiles, "weights" by the one
    of its weights; with "loaded" by
    the forward kernel of calls that are not worth tensor descriptors, else they are taken where the architecture has them
python compile_triton.py --gated                        those in GATED
python compile_triton.py --write-budgets [NAME…]        what they take becomes the budget of this version of Triton
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from decode_specs import DECODING
from gradients import floats, grad_out
from machine_code import read
from problems import Problem
from specs import CASES, RANDOM_CASES
from stub_driver import launched, with_driver

from fuse.ir import tile_map
from fuse.kernel import sharing
from fuse.targets.cpp.render import ENTRY
from fuse.targets.triton import copies, plan_decode
from fuse.targets.triton.launch import TritonKernel
from fuse.targets.triton.launch_backward import TritonBackward
from fuse.targets.triton.launch_tile_map import TritonTileMap
from fuse.targets.triton.launch_weights import TritonWeights

GATED = (
    *(f"causal@{width}:bfloat16:{arch}" for width in (64, 128) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *(f"causal@{width}/loaded:bfloat16:sm_90" for width in (64, 128)),
    *(f"window@128{part}:bfloat16:sm_90" for part in ("", "/loaded")),
    *(f"plain@128:float16:{arch}" for arch in ("sm_80", "sm_90")),
    *(f"plain@64:float32:{arch}" for arch in ("sm_90", "gfx942")),
    *(f"{name}@128:bfloat16:sm_90" for name in (
        "soft_cap_causal", "left_padding_and_causal", "documents", "dense_additive", "relative_table", "mapped_bool", "alibi",
        "sinks",
    )),
    *(f"groups_of_8@128/2:bfloat16:{arch}" for arch in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *(f"heads_71_to_1@128/1:bfloat16:{arch}" for arch in ("sm_80", "gfx942")), "left_padding@128/2:bfloat16:sm_90",
    *(f"documents_in_any_order@128:bfloat16:{arch}" for arch in ("sm_80", "gfx942")),
    "documents_in_any_order@256:bfloat16:sm_90", "causal@128:float16:sm_75",
    *(f"causal@128:bfloat16:{arch}" for arch in ("sm_86", "sm_120", "sm_121", "gfx90a", "gfx950")),
    "mapped_bool/map:bfloat16:sm_90", "mapped_bool/map:bfloat16:gfx942",
    *(f"causal@64/backward:bfloat16:{arch}" for arch in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *(f"causal@128/backward:bfloat16:{arch}" for arch in ("sm_80", "sm_90", "sm_100")),
    *(f"documents_in_any_order@64/backward:bfloat16:{arch}" for arch in ("sm_90", "gfx942")),
    *(f"documents_in_any_order@128/backward:bfloat16:{arch}" for arch in ("sm_80", "sm_100")),
    "mapped_bool@128/backward:bfloat16:sm_90", "relative_table@64/backward:bfloat16:sm_90",
    *(f"dropout_causal_two_tiles@64:bfloat16:{arch}" for arch in ("sm_80", "sm_90", "sm_100")),
    *(f"dropout_causal_two_tiles@64/backward:bfloat16:{arch}" for arch in ("sm_80", "sm_100")),
    "dropout_causal_two_tiles@128:bfloat16:sm_90", "head_dim_256:bfloat16:sm_90",
    "head_dim_80:bfloat16:sm_80",
    *(f"{name}@128{part}:bfloat16:sm_90" for name in ("retention", "linear_attention_causal") for part in ("", "/backward")),
    "linear_attention_causal@64/2:bfloat16:sm_90",
)  # fmt: skip


def budgets_file() -> Path:
    """Of the minor version of Triton: another one generates other code."""
    version = ".".join(triton.__version__.split(".")[:2])
    return Path(__file__).with_name("budgets") / f"triton-{version}.json"


def compiled(asked: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kernel that is launched for what was asked."""
    name, dtype, arch = asked.split(":")
    name, _, parts = name.partition("/")
    name, _, width = name.partition("@")
    problem = (CASES | RANDOM_CASES | DECODING)[name](dtype)
    if width:
        problem = widened(problem, int(width))
    with_driver(arch)
    copies.WORTH = 2**62 if parts == "loaded" else 0
    if parts == "backward":
        lse = torch.empty(problem.spec.lse_shape(problem.sizes))
        out = torch.empty(problem.spec.out_shape(problem.sizes), dtype=getattr(torch, problem.spec.out_dtype))
        backward = TritonBackward(problem.spec, floats(problem))
        backward(grad_out(problem), problem.operands, problem.sizes, out, lse)
    elif parts == "weights":
        lse = torch.empty(problem.spec.lse_shape(problem.sizes))
        TritonWeights(problem.spec)(problem.operands, lse, problem.sizes, 0)
    elif parts == "map":
        use = tile_map.map_of(problem.spec)
        assert use is not None
        sizes = dict(zip(problem.spec.symbols, problem.sizes, strict=True))
        TritonTileMap(use.tile_map)([problem.operands[i] for i in use.operands], [sizes[name] for name in use.symbols])
    else:
        route = plan_decode.packed(sharing.runs(problem.spec), problem.sizes, int(parts)) if parts.isdecimal() else None
        TritonKernel(problem.spec).launch(problem.operands, problem.sizes, None, route)
    for files in launched():
        kernel = json.loads(files["json"].read_text())["name"].removeprefix(ENTRY).strip("_")
        yield f"{asked} {kernel}".strip(), read(files)


def widened(problem: Problem, width: int) -> Problem:
    """The same with head dimensions of ``width``."""
    operands = [t.new_zeros((*t.shape[:-1], width)) for t in problem.operands[:3]]
    return Problem(replace(problem.spec, qk_dim=width, v_dim=width), [*operands, *problem.operands[3:]], problem.sizes)


def main(arguments: list[str]) -> None:
    write, named = arguments[:1] == ["--write-budgets"], [a for a in arguments if not a.startswith("--")]
    found = dict(kernel for asked in named or GATED for kernel in compiled(asked))
    if write:
        path = budgets_file()
        budgets = (json.loads(path.read_text()) if named else {}) | found
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in budgets.items())
        path.write_text(f"{{\n{lines}\n}}\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
