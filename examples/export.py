"""Export: a program of ``torch.export`` with its attention fused, saved, loaded, and run at another length.

    python examples/export.py

prints

    1 attention site, 1 fused
    loaded, at 77 positions: as the model

A process that loads it has to ``import fuse`` first: the operator is registered from Python. Kernels are not in the file, but
built, or taken from the cache, where it first runs. For AOTInductor see docs/tutorial.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import fuse


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        score = (q @ k.mT / 4).masked_fill(~seen, -torch.inf)
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)


def main() -> None:
    torch.manual_seed(0)
    model, x = Layer().eval(), torch.randn(2, 40, 64)
    lengths = {"x": {1: torch.export.Dim("length", max=500)}}
    program, report = fuse.transform(torch.export.export(model, (x,), dynamic_shapes=lengths))
    print(report.summary)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "layer.pt2"
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        longer = torch.randn(2, 77, 64)
        torch.testing.assert_close(loaded(longer), model(longer))
    print("loaded, at 77 positions: as the model")


if __name__ == "__main__":
    main()
