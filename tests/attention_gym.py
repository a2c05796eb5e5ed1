"""Masks and score functions that others wrote for FlexAttention: all of attn-gym's, for BATCH, HEADS and LENGTH."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attn_gym import masks as m
from attn_gym import mods
from attn_gym.masks.document_mask import length_to_offsets
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

BATCH, HEADS, LENGTH = 1, 2, 128
Function = Callable[..., Tensor]

_generator = torch.Generator().manual_seed(0)


def _learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=_generator) / 2)


def _drawn(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=_generator)


_OFFSETS = length_to_offsets([50, 28, 30, 20], "cpu")
_TREE = m.build_tree_ancestor_matrix([-1, *(i // 3 for i in range(LENGTH - 1))], "cpu")
_TILES = torch.tensor([[0, 1], [1, 3], [0, 2], [2, 3]]).expand(BATCH, HEADS, 4, 2)

MASKS: dict[str, Function] = {
    "causal": m.causal_mask,
    "sliding window": m.generate_sliding_window(40),
    "prefix": m.generate_prefix_lm_mask(50),
    "dilated": m.generate_dilated_sliding_window(20, 3),
    "documents": m.generate_doc_mask_mod(m.causal_mask, _OFFSETS),
    "packed documents": m.generate_packed_causal_doc_mask_mod(_OFFSETS),
    "global tokens": m.generate_global_sliding_window(20, _drawn(30, LENGTH) == 0),
    "shared prefix": m.generate_shared_prefix_mask_mod(_OFFSETS, torch.tensor([0, 0, 2, 2])),
    "block diffusion": m.generate_block_diffusion_mask(LENGTH // 2, 16),
    "batches": m.batchify_mask_mod(m.causal_mask, 48),
    "images": m.generate_vision_cross_attention_mask_mod(torch.tensor([[0, 50], [20, 100], [40, 90], [80, 128]]), 32),
    "tree": m.generate_jetspec_tree_causal_mask_mod(0, _TREE),
    "draft heads": m.generate_jetspec_training_mask_mod(0, 24),
    "neighbourhood": m.generate_natten(8, 16, 5, 5),
    "tiled neighbourhood": m.generate_tiled_natten(8, 16, 5, 5, 4, 4),
    "morton neighbourhood": m.generate_morton_natten(8, 16, 5, 5),
    "tiles in a plane": m.generate_sta_mask_mod_2d((8, 12), (8, 8), (4, 4), 32),
    "tiles in space": m.generate_sta_mask_mod_3d((2, 8, 6), (2, 4, 4), (2, 4, 2), 32),
    "frames": m.generate_spatial_head_mask_mod(10, 4, 29, 1, True, 16),
    "frames in time": m.generate_temporal_head_mask_mod(10, 4, 29, 1),
    "chosen tiles": m.generate_vsa_mask_mod(_TILES, 32),
}

MODS: dict[str, Function] = {
    "alibi": mods.generate_alibi_bias(HEADS),
    "soft-cap": mods.generate_tanh_softcap(20),
    "sandwich": mods.generate_sandwich_bias(HEADS, LENGTH),
    "gelu": mods.generate_activation_score_mod(),
    "graph distances": mods.generate_graphormer_spatial_bias(_learned(HEADS, 7), _drawn(7, BATCH, LENGTH, LENGTH)),
    "graph edges": mods.generate_graphormer_edge_bias(
        _learned(HEADS, 2, 3), _drawn(3, BATCH, LENGTH, LENGTH, 2), _drawn(3, BATCH, LENGTH, LENGTH)
    ),
    "latent": mods.generate_mla_rope_score_mod(_learned(BATCH, HEADS, LENGTH, 8), _learned(BATCH, 1, LENGTH, 8), HEADS),
}


def block_mask(name: str) -> BlockMask:
    if name == "chosen tiles":  # its lists are written by hand
        return m.create_vsa_block_mask(_TILES, 32, LENGTH // 32)
    return create_block_mask(MASKS[name], BATCH, HEADS, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=32)


def learned(mod: Function) -> list[Tensor]:
    """The tensors that a score function captures, and that want a gradient."""
    held = [cell.cell_contents for cell in mod.__closure__ or ()]
    tensors = [x for value in held for x in (value if isinstance(value, list) else [value])]
    return [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
