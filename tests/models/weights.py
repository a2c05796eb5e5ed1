"""Weights under which attention matters.

As transformers initialises them, models attend almost uniformly: a wrong mask or scale would change nothing. Matrices are
drawn with a gain a little above one instead, tables of embeddings and positions with entries of about one half.
"""

from __future__ import annotations

import torch
from torch import nn

GAIN, TABLE, BIAS = 1.2, 0.5, 0.1


def redraw(model: nn.Module, draw: int = 0) -> None:
    """Draws all weights of ``model`` but those of its normalisations, the same ones for the same ``draw``."""
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" not in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(0, _deviation(module, parameter), generator=generator)


def _deviation(module: nn.Module, parameter: nn.Parameter) -> float:
    shape = parameter.shape
    if parameter.dim() < 2:
        return BIAS
    if isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__ or shape[0] == 1:
        return TABLE
    if isinstance(module, nn.modules.conv._ConvNd):
        return GAIN * parameter[0].numel() ** -0.5
    return GAIN * max(shape) ** -0.5  # whichever dimension is summed over
