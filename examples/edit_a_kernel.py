"""Edit a kernel: FUSE_DUMP writes it as a file that runs alone, and takes the file in its place once you have changed it.

    python examples/edit_a_kernel.py

prints the kernel's first lines, halves the number of keys that its tiles take, and runs the model again:

    // out = sum over k of w * value,  w = prob
    // softmax over k of where(q < k, -inf, score * 0.125)
    // visible where q >= k
    constexpr int BK = 128 becomes constexpr int BK = 64
    edited kernel causal_float32_64x64_avx512-2f30c485a07f.cpp

A process keeps the kernels that it has loaded, so the two runs are processes of their own. An edit that cannot be built is told
with its file and line, and the model runs without it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import fuse

TILE = re.compile(r"constexpr int BK = (\d+)")


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
    return (query @ key.mT * 0.125).masked_fill(q < k, -torch.inf).softmax(-1) @ value


def run(folder: str) -> str:
    """What has computed it, as the report says."""
    os.environ["FUSE_DUMP"] = folder
    inputs = torch.randn(3, 1, 4, 300, 64).unbind()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(attend, backend="fuse")(*inputs), attend(*inputs))
    runs = fuse.report().sites[-1].runs["forward"]
    return f"{runs.by} {runs.file.name}" if runs.file else str(runs)


def edit(file: Path) -> None:
    """Halves the number of keys that are taken together."""
    source = file.read_text()
    found = TILE.search(source)
    assert found is not None
    shorter = f"constexpr int BK = {int(found[1]) // 2}"
    file.write_text(source.replace(found[0], shorter))
    print("\n".join(source.splitlines()[:3]), f"{found[0]} becomes {shorter}", sep="\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, mp.get_context("spawn")) as another_process:
            another_process.submit(run, folder).result()
        (file,) = Path(folder).glob("*.cpp")
        edit(file)
        print(run(folder))


if __name__ == "__main__":
    main()
