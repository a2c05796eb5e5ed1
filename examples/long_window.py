"""A long context in little memory: 65536 positions, of which each sees the 512 before it.

    python examples/long_window.py

prints

    the scores would take 32768 MB, the mask 4096 MB
    the process held 621 MB at most, of which 128 MB are query, key, value and result
    eight rows, computed by hand: as in the result

Neither the scores nor the mask are ever made; tiles outside of the window are not visited.
"""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

LENGTH, WINDOW, HEADS, WIDTH = 65536, 512, 2, 64
MB = 2**20


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
    score = (query @ key.mT / WIDTH**0.5).masked_fill((q < k) | (q - k >= WINDOW), -torch.inf)
    return score.softmax(-1) @ value


def peak() -> int:
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, LENGTH, WIDTH)
    compiled = torch.compile(attend, backend="fuse")
    with torch.no_grad():
        found = compiled(query, key, value)
    print(f"the scores would take {HEADS * LENGTH**2 * 4 // MB} MB, the mask {LENGTH**2 // MB} MB")
    print(f"the process held {peak() // MB} MB at most, of which {4 * found.nbytes // MB} MB are query, key, value and result")
    rows, seen = slice(9000, 9008), slice(9000 - WINDOW + 1, 9008)
    q, k = torch.arange(9000, 9008)[:, None], torch.arange(9000 - WINDOW + 1, 9008)
    score = (query[:, :, rows] @ key[:, :, seen].mT / WIDTH**0.5).masked_fill((q < k) | (q - k >= WINDOW), -torch.inf)
    torch.testing.assert_close(found[:, :, rows], score.softmax(-1) @ value[:, :, seen])
    print("eight rows, computed by hand: as in the result")


if __name__ == "__main__":
    main()
