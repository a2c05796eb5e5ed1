"""One step of training with dropout and a learned bias through Inductor, as a process of its own.

Prints a digest of the gradients, how many sites were fused, and how often AOTAutograd and Inductor took a graph from disk.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fuse


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(32, 96), nn.Parameter(torch.randn(9, 9))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        weight = (q @ k.mT / 4 + self.bias).softmax(-1)
        return (nn.functional.dropout(weight, 0.1) @ v).square().sum()


torch.manual_seed(0)
layer, x = Layer(), torch.randn(2, 9, 32)
torch.compile(layer, backend="fuse", options={"target": "reference"})(x).backward()
grads = [p.grad for p in layer.parameters() if p.grad is not None]
print(
    hashlib.sha256(b"".join(g.numpy().tobytes() for g in grads)).hexdigest()[:12],
    fuse.report().recovered,
    counters["aot_autograd"]["autograd_cache_hit"],
    counters["inductor"]["fxgraph_cache_hit"],
)
