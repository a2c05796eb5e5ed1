"""FlexAttention as the products that it stands for: torch's own plain implementation, and the BlockMask's lists with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from fuse.passes.read.graph import Calls
from fuse.report.reasons import Declined, UnsupportedShape
from fuse.torch_private import LARGE_SPARSE_BLOCK_SIZE, math_attention, without_vmap_loops

_LISTS, _SIZES = slice(2, 6), slice(-3, -1)  # of the tuple that a BlockMask is in a graph; the last of it is mask_mod
_PARTIAL, _FULL = 1, 2
IN_BASE_2: Calls = ((torch.ops.aten.div.Tensor, (math.log(2),)),)  # of what is in base e


def is_flex(node: Node) -> bool:
    return node.target is torch.ops.higher_order.flex_attention


def flex_as_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_buffers: tuple[Any, ...] = (),
    mask_buffers: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, Hq, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev) → result (B, Hq, L, Ev), log-sum-exp and maximum.

    Source: ``math_attention``, the operator without a compiler, which reads mask_mod alone; the statistics are in base 2.
    As in the operator's kernels, an entry counts where its block is listed and, unless it is listed as full, mask_mod holds.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    with torch.autocast(device, enabled=False):
        score_mod, mask_mod = _readable(score_mod), _readable(_listed(block_mask, query.shape[:2]))
        mask = (*block_mask[:-1], mask_mod)
        return math_attention(query, key, value, score_mod, mask, scale, kernel_options, score_buffers, mask_buffers)


class _Index(TorchFunctionMode):
    """x[i] with a scalar i is a lookup, and no view at a place that has to be known now.

    ``math_attention`` has a mode of its own for that, whose autograd.Function cannot be made functional.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            x, at = args
            places = at if isinstance(at, tuple) else (at,)
            if all(isinstance(i, (Tensor, int)) for i in places):
                return _looked_up(x, places)
        return func(*args, **(kwargs or {}))


def _looked_up(x: Tensor, places: tuple[Tensor | int, ...]) -> Tensor:
    scalars: list[Tensor] = []
    for i in places:
        if isinstance(i, int):
            x = x.select(len(scalars), i)
        else:
            scalars.append(i)
    return torch.ops.aten.index.Tensor(x, scalars) if scalars else x


def _readable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` for ``vmap``, which raises where vmap would call an operator once for every query and key."""

    def call(*args: Any) -> Tensor:
        with without_vmap_loops(), _Index():
            return function(*args)

    return call


def _listed(block_mask: tuple[Any, ...], batch: torch.Size) -> Callable[..., Tensor]:
    """mask_mod and the lists of blocks as one such function; ``batch``: how many batches and heads there are."""
    # Sizes of blocks are fixed: with them tiles are skipped, and a mask of other blocks is rare
    mask_mod, sizes, classes = block_mask[-1], tuple(map(int, block_mask[_SIZES])), _classes(block_mask)
    if any(n not in (1, whole) for n, whole in zip(classes.shape, batch, strict=False)):
        raise Declined(UnsupportedShape(f"a BlockMask of {tuple(classes.shape[:2])} for {tuple(batch)} batches and heads"))

    def counts(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *buffers: Any) -> Tensor:
        places = (b, h, q // sizes[0], k // sizes[1])
        found = classes[tuple(torch.zeros_like(x) if n == 1 else x for x, n in zip(places, classes.shape, strict=True))]
        visible: Tensor = (found == _FULL) | ((found == _PARTIAL) & mask_mod(b, h, q, k, *buffers))
        return visible

    return counts


def _classes(block_mask: tuple[Any, ...]) -> Tensor:
    """The class of each block, uint8 (B, H, rows, columns), from lists (B, H, rows, columns) and how much of each counts."""
    partial_count, partial, full_count, full = block_mask[_LISTS]
    if block_mask[_SIZES] == (LARGE_SPARSE_BLOCK_SIZE,) * 2:  # a call without a mask has one block: a comparison is all
        return torch.where((partial_count[..., None] > 0) & (partial == 0), _PARTIAL, 0).to(torch.uint8)
    found = _marked(torch.zeros_like(partial, dtype=torch.uint8), partial_count, partial, _PARTIAL)
    return found if full_count is None else _marked(found, full_count, full, _FULL)


def _marked(found: Tensor, count: Tensor, listed: Tensor, mark: int) -> Tensor:
    """``found`` with ``mark`` at the columns that are listed."""
    columns = found.shape[-1]
    counts = torch.arange(columns, device=found.device) < count.unsqueeze(-1)
    spare = torch.nn.functional.pad(found, (0, 1))  # where all that does not count is put
    return spare.scatter(-1, torch.where(counts, listed, columns).long(), mark)[..., :-1]
