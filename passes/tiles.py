"""A mask that is an opaque tensor gets a map of its tiles: computed once in the graph, for all heads and layers."""

from __future__ import annotations

from dataclasses import replace

import torch

from fuse.ir.index import IndexExpr
from fuse.ir.serial import in_graph
from fuse.ir.spec import Operand
from fuse.ir.tile_map import KEYS, ROWS, Use, map_of
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.read.graph import is_state
from fuse.passes.read.trace import Value

# Calls that are smaller than some cells, such as those of windows and of decoding, cost less than the map.
_SMALLEST_ROWS, _SMALLEST_KEYS = 4 * ROWS, 4 * KEYS


def map_tiles(lifted: Lifted, context: SiteContext) -> Lifted:
    """The site with a map as its last operand, if that can skip tiles."""
    use, spec = map_of(lifted.spec), lifted.spec
    if use is None or spec.mask is None or _is_small(lifted.sizes[spec.batch : spec.batch + 2]):
        return lifted
    mask = replace(spec.mask, tiles=use.load)
    operands = (*spec.operands, Operand(len(use.load.coords), "uint8"))
    value = _map_value(use, lifted, context)
    return replace(lifted, spec=replace(spec, mask=mask, operands=operands), leaves=(*lifted.leaves, value))


def _is_small(lengths: tuple[IndexExpr, ...]) -> bool:
    limits = (_SMALLEST_ROWS, _SMALLEST_KEYS)
    return any(n.is_Integer and n < limit for n, limit in zip(lengths, limits, strict=True))


def _map_value(use: Use, lifted: Lifted, context: SiteContext) -> Value:
    """The call of ``fuse::tile_map`` as if it had been traced."""
    size_of = dict(zip(lifted.spec.symbols, lifted.sizes, strict=True))
    read = [lifted.leaves[i] for i in use.operands]
    sizes = [size_of[name] for name in use.symbols]
    kept = all((node := context.trace.node_of.get(v)) is not None and is_state(node) for v in read)
    shape = (0,) * len(use.load.coords)  # never looked at
    meta = read[0].meta.new_empty(shape, dtype=torch.uint8)
    arguments = (read, sizes, in_graph(use.tile_map.to_json()), context.target, kept)
    return Value(torch.ops.fuse.tile_map.default, arguments, {}, meta)
