"""Which tiles of keys a block of queries visits, as one Triton module, for masks that have more than bounds."""

from __future__ import annotations

from fuse import tiles
from fuse.codegen.ranges_triton import TritonRanges
from fuse.codegen.render import environment, residual_of
from fuse.codegen.render_triton import Source, arguments, bounds_of, header, mask_axes
from fuse.codegen.triton import Block, TritonWriter
from fuse.spec import AttentionSpec

TILES = "fuse_attention_tiles"


def render_tiles(spec: AttentionSpec) -> str:
    """The kernel TILES; its arguments are those of ``fuse.runtime.triton_tiles``."""
    source, keys = Source(spec), Block()
    bounds = [source.bound(name, node) for name, node in bounds_of(spec)]
    residual = residual_of(spec)
    assert residual is not None
    cells, result = "", ""
    if spec.mask is not None and spec.mask.tiles is not None:
        names = {"q": "cell_q", "k": "cell_k"}
        writer = TritonWriter(lambda axes: keys if axes & {"q", "k"} else source.site, source.real, source.count, names=names)
        cells = writer.value(spec.mask.tiles)
    else:
        result = TritonRanges(source.writer(keys), source.rows, keys, source.count).range(residual)
    context = arguments(spec) | {
        "header": header(spec, "tiles that are visited"), "entry": TILES, "bounds": bounds, "mask_axes": mask_axes(spec),
        "site": source.site, "rows": source.rows, "keys": keys, "cells": cells, "result": result, "empty": tiles.EMPTY,
        "full_cell": tiles.FULL, "map_rows": tiles.ROWS, "map_keys": tiles.KEYS,
    }  # fmt: skip
    return environment().get_template("triton/tiles.py.jinja").render(context)
