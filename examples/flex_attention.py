"""FlexAttention: a program that calls ``flex_attention`` needs no change, and trains on CPUs.

    python examples/flex_attention.py

prints

    1 attention site, 1 fused
    gradients of query, key, value and slopes are as in plain PyTorch
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fuse

LENGTH, HEADS = 256, 4


def main() -> None:
    torch.manual_seed(0)
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, HEADS, LENGTH, 32))
    slopes = (0.5 ** torch.arange(1.0, HEADS + 1)).requires_grad_()
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 100), None, None, LENGTH, LENGTH, device="cpu")

    def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + slopes[h] * (k - q)

    def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = flex_attention(query, key, value, score_mod=alibi, block_mask=mask)
        assert isinstance(out, Tensor)
        return out

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        score = query @ key.mT / 32**0.5 + slopes[:, None, None] * (k - q)
        return score.masked_fill((q < k) | (q - k >= 100), -torch.inf).softmax(-1) @ value

    leaves = (query, key, value, slopes)
    compiled = torch.compile(flex, backend="fuse")
    found, expected = (torch.autograd.grad(way(query, key, value).square().sum(), leaves) for way in (compiled, plain))
    print(fuse.report().summary)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    print("gradients of query, key, value and slopes are as in plain PyTorch")


if __name__ == "__main__":
    main()
