"""Triton's sources read from the top: an outline, kernels that take what they read, functions that are called, short lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import partial

import pytest
from decode_specs import DECODING
from gradients import floats
from specs import CASES, RANDOM_CASES

from fuse.ir import tile_map
from fuse.targets.triton.outline import WIDTH
from fuse.targets.triton.plan import ARCHITECTURES, described, plan_triton
from fuse.targets.triton.plan_decode import plans
from fuse.targets.triton.render import render_triton
from fuse.targets.triton.render_backward import render_backward
from fuse.targets.triton.render_decode import render_decode
from fuse.targets.triton.render_tile_map import render_tile_map_triton
from fuse.targets.triton.render_tiles import is_listed, render_tiles

NAMES = ("window", "documents", "mapped_bool", "relative_table", "two_extra_logits", "dropout")


def sources(name: str) -> Iterator[str]:
    made = (CASES | RANDOM_CASES | DECODING)[name]("bfloat16")
    spec, arch = made.spec, ARCHITECTURES["sm_90"]
    yield render_triton(spec, plan_triton(spec, arch))
    yield render_decode(spec, plans(spec, arch)[0])
    yield render_backward(spec, floats(made), described(spec, arch))
    yield from map(partial(render_tiles, spec), (owner for owner in "qk" if is_listed(spec, owner)))
    if (use := tile_map.map_of(spec)) is not None:
        yield render_tile_map_triton(use.tile_map)


def read(*nodes: ast.AST) -> set[str]:
    found = (n for node in nodes for n in ast.walk(node))
    return {n.id for n in found if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_source_has_is_used_and_what_it_holds_is_said_at_its_top(name: str) -> None:
    for source in sources(name):
        tree = ast.parse(source)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        kernels = [f for f in functions if f.name.startswith("fuse_")]
        for f in kernels:
            assert [a.arg for a in f.args.args if a.arg not in read(*f.body)] == []
        imports = [a.asname or a.name for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
        defined = {*imports, *(f.name for f in functions if f not in kernels)}
        assert defined - read(*tree.body) == set()
        code = [line for line in source.splitlines() if not line.startswith("# ")]
        assert max(map(len, code)) <= WIDTH
        top = source.partition("# contents, in order\n")[2].partition("import triton")[0]
        assert [line.split()[1] for line in top.splitlines() if "# edit" not in line] == [f.name for f in kernels]
