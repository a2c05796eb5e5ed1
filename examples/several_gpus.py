"""Several GPUs: data-parallel training, a process for each device, by gloo on CPUs where there are no GPUs.

    python examples/several_gpus.py

prints, with two processes on CPUs

    rank 0 of 2, gloo: 1 attention site, 1 fused
    rank 1 of 2, gloo: 1 attention site, 1 fused
    gradients: as those of one process with all texts

The model is compiled, then wrapped: each rank finds and builds the same kernels, and the cache serves all of them. Under tensor
parallelism each rank fuses the attention of its own heads.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fuse

TEXTS, LENGTH, WIDTH, HEADS = 4, 64, 64, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        score = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(hidden, -torch.inf)
        mixed: Tensor = self.out((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return mixed


def model_and_texts(device: torch.device) -> tuple[nn.Module, Tensor]:
    """The same in every process."""
    torch.manual_seed(0)
    return Attention().to(device), torch.randn(TEXTS, LENGTH, WIDTH).to(device)


def backward(model: nn.Module, texts: Tensor) -> None:
    """Gradients of this rank's texts, averaged over all ranks.

    The wrapper lives no longer than this call: freed after its group, it can wait for gloo's thread for ever.
    """
    wrapped = DistributedDataParallel(torch.compile(model, backend="fuse"))
    wrapped(texts).square().mean().backward()


def train(rank: int, ranks: int, store: str) -> None:
    on_gpus = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model, texts = model_and_texts(device)
    backward(model, texts.chunk(ranks)[rank])
    for turn in range(ranks):
        if turn == rank:
            print(f"rank {rank} of {ranks}, {dist.get_backend()}: {fuse.report().summary}", flush=True)
        dist.barrier()
    if rank == 0:
        alone, texts = model_and_texts(device)
        alone(texts).square().mean().backward()
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
        print("gradients: as those of one process with all texts", flush=True)
    dist.destroy_process_group()


def main() -> None:
    ranks = max(2, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (ranks, f"{folder}/store"), ranks)


if __name__ == "__main__":
    main()
