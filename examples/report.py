"""The page of a report: local and global layers over packed documents, and a head that returns its attention weights.

    python examples/report.py                                             writes report.html
    python -m fuse explain examples/report.py:build --html report.html    the same from the shell

Nothing is built and no model runs: the page shows what would be done with it. docs/report.md tells how to read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fuse


class Attention(nn.Module):
    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.qkv, self.window = nn.Linear(512, 1536), window

    def forward(self, x: Tensor, document: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 8, 64)).permute(2, 0, 3, 1, 4)
        i = torch.arange(x.shape[1])
        distance = i[:, None] - i
        seen = (distance >= 0) & (document[:, None, :, None] == document[:, None, None, :])
        if self.window is not None:
            seen = seen & (distance < self.window)
        score = (q @ k.mT / 8).masked_fill(~(seen & padding[:, None, None]), -torch.inf)
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Pooling(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(256 if i % 4 else None) for i in range(8))
        self.head = Pooling()

    def forward(self, x: Tensor, document: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = x + layer(x, document, padding)
        pooled: tuple[Tensor, Tensor] = self.head(x)
        return pooled


def build() -> tuple[nn.Module, dict[str, Any]]:
    """The model, and its arguments."""
    document = (torch.arange(2048) // 300).expand(2, 2048)
    return Packed().eval(), {"x": torch.randn(2, 2048, 512), "document": document, "padding": torch.ones(2, 2048) > 0}


if __name__ == "__main__":
    model, arguments = build()
    with torch.no_grad():
        print(fuse.explain(model, **arguments).to_html("report.html"))
