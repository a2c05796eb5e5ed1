"""A long sequence on several ranks: a small Llama, its parameters sharded by FSDP2, its sequence by fuse's context parallelism.

    torchrun --nproc-per-node 4 examples/long_context.py

compares the loss and every gradient with those of one process in eager PyTorch, and printed

    causal    in order  gather       240 KB sent   loss off by 9.5e-07, gradients by 8.1e-07
    causal    in order  ring         240 KB sent   loss off by 9.5e-07, gradients by 7.6e-07
    causal    balanced  gather       360 KB sent   loss off by 4.8e-07, gradients by 9.0e-07
    causal    balanced  ring         360 KB sent   loss off by 9.5e-07, gradients by 8.1e-07
    window    in order  gather        22 KB sent   loss off by 0.0e+00, gradients by 7.3e-07
    window    in order  ring          22 KB sent   loss off by 0.0e+00, gradients by 7.3e-07
    window    balanced  gather        45 KB sent   loss off by 4.8e-07, gradients by 6.8e-07
    window    balanced  ring          45 KB sent   loss off by 4.8e-07, gradients by 6.8e-07
    documents in order  gather       248 KB sent   loss off by 0.0e+00, gradients by 5.9e-07
    documents in order  ring         248 KB sent   loss off by 0.0e+00, gradients by 6.7e-07
    documents balanced  gather       371 KB sent   loss off by 4.8e-07, gradients by 6.9e-07
    documents balanced  ring         371 KB sent   loss off by 4.8e-07, gradients by 7.5e-07
    padding   in order  gather       241 KB sent   loss off by 9.5e-07, gradients by 8.1e-07
    padding   in order  ring         241 KB sent   loss off by 9.5e-07, gradients by 7.6e-07
    padding   balanced  gather       361 KB sent   loss off by 4.8e-07, gradients by 9.0e-07
    padding   balanced  ring         361 KB sent   loss off by 9.5e-07, gradients by 8.1e-07
    16 attention sites, 16 fused

Each rank has a fourth of the positions of each text. ``fuse.shard_sequence`` splits a batch, and under the option
"context_parallel" every attention is that of the whole text, whatever its mask: keys and values that a rank's queries see come
from the ranks that have them. ``--length`` is that of the texts, ``--window`` that of the window, ``--masks`` chooses some, and
``--forward`` leaves the gradients and the comparison out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import fuse
from fuse.parallel.exchange import traffic

TEXTS, VOCABULARY, WIDTH, HEADS, GROUPS, LAYERS = 2, 128, 64, 4, 2, 2
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of query and key positions, documents and what is no padding


def causal(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return (k <= q)[None, None]


def documents(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return causal(q, k, documents, kept) & (documents[:, None, :, None] == documents[:, None, None])


def padding(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
    return causal(q, k, documents, kept) & kept[:, None, None]


def window(width: int) -> Mask:
    def window(q: Tensor, k: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
        return causal(q, k, documents, kept) & (q - k < width)

    return window


# ---------------------------------------------------------------------------------------------------------------- model


def rotary(x: Tensor, position_ids: Tensor) -> Tensor:
    """By the positions in the whole text, which a rank is told: it cannot count them."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = position_ids[:, None, :, None] * rates
    a, b = x.split(half, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class Block(nn.Module):
    """A layer of Llama, with its attention written out; keys and values are shared by HEADS / GROUPS heads."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask, features = mask, WIDTH // HEADS
        self.before_attention, self.before_feed_forward = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (
            nn.Linear(WIDTH, n * features, bias=False) for n in (HEADS, GROUPS, GROUPS, HEADS)
        )  # fmt: skip
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x), position_ids, documents, kept)
        y = self.before_feed_forward(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result

    def attention(self, x: Tensor, position_ids: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = rotary(q, position_ids), rotary(k, position_ids)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        at = torch.arange(x.shape[1], device=x.device)
        seen = self.mask(at[:, None], at, documents, kept)
        score = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(~seen, -torch.inf)
        mixed: Tensor = self.o((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return mixed


class Llama(nn.Module):
    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(mask) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, documents: Tensor, kept: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, position_ids, documents, kept)
        logits: Tensor = self.head(self.norm(x))
        return logits


def batch(length: int) -> dict[str, Tensor]:
    """Texts of several documents; the second ends with padding."""
    at = torch.arange(length)
    kept = torch.ones(TEXTS, length, dtype=torch.bool)
    kept[1, -length // 16 :] = False
    ids = torch.randint(VOCABULARY, (TEXTS, length))
    parts = torch.stack((at * 3 // length, at * 5 // length))
    return {"input_ids": ids, "documents": parts, "kept": kept, "labels": ids.masked_fill(~kept, -100)}


def loss_of(model: nn.Module, given: dict[str, Tensor], labels: int) -> Tensor:
    """The sum over the positions that are there, over how many ``labels`` there are in all."""
    logits = model(*(given[name] for name in ("input_ids", "position_ids", "documents", "kept")))
    return F.cross_entropy(logits.flatten(0, 1), given["shift_labels"].flatten(), ignore_index=-100, reduction="sum") / labels


# ------------------------------------------------------------------------------------------------------------ one setting


@dataclass(frozen=True)
class Found:
    """``sent``: bytes of keys and values, of all ranks, in one forward pass of one layer."""

    loss: float
    gradient: float
    sent: float


def trained(mask: Mask, length: int, mesh: DeviceMesh, across: fuse.ContextParallel, forward: bool) -> Found:
    """A step on shards; the largest differences from the same step in one process."""
    torch.manual_seed(0)
    whole, model = Llama(mask), Llama(mask)
    model.load_state_dict(whole.state_dict())
    given = batch(length)
    shard = fuse.shard_sequence(given, across)
    labels = int((fuse.shard_sequence(given, fuse.ContextParallel(across.group))["shift_labels"] != -100).sum())
    labels = int(summed(torch.tensor(float(labels))))
    for block in model.blocks:
        block.compile(dynamic=True, backend="fuse", options={"inner": "eager", "context_parallel": across})
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    traffic.reset()
    loss = loss_of(model, shard, labels)
    sent = float(summed(torch.tensor(float(traffic.sent)))) / LAYERS
    if forward:
        return Found(0.0, 0.0, sent)
    (loss * mesh.size()).backward()  # FSDP takes the mean over ranks
    return Found(*differences(whole, model, given, float(summed(loss.detach())), labels), sent)


def differences(whole: nn.Module, model: nn.Module, given: dict[str, Tensor], loss: float, labels: int) -> tuple[float, float]:
    """Of the loss, and of the gradients as shares of their largest number, from those of one process."""
    after = torch.cat((given["labels"][:, 1:], given["labels"].new_full((TEXTS, 1), -100)), 1)
    places = torch.arange(after.shape[1]).expand(TEXTS, -1)
    expected = loss_of(whole, {**given, "position_ids": places, "shift_labels": after}, labels)
    expected.backward()
    worst = 0.0
    for (name, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        gradient = q.grad.full_tensor()
        worst = max(worst, float((gradient - p.grad).abs().max() / p.grad.abs().max()))
    return abs(loss - float(expected.detach())), worst


def summed(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--masks", nargs="+")
    parser.add_argument("--forward", action="store_true")
    chosen = parser.parse_args()
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("cp",))
    torch.set_num_threads(1)
    masks: list[Mask] = [causal, window(chosen.window), documents, padding]
    for mask in (mask for mask in masks if mask.__name__ in (chosen.masks or [mask.__name__])):
        for balanced in (False, True):
            for way in ("gather", "ring"):
                torch.compiler.reset()
                across = fuse.ContextParallel(mesh, balanced=balanced, way=way)
                found = trained(mask, chosen.length, mesh, across, chosen.forward)
                if dist.get_rank() == 0:
                    compared = "" if chosen.forward else f"   loss off by {found.loss:.1e}, gradients by {found.gradient:.1e}"
                    layout = "balanced" if balanced else "in order"
                    print(f"{mask.__name__:10}{layout:10}{way:8}{found.sent / 2**10:8.0f} KB sent{compared}", flush=True)
    if dist.get_rank() == 0:
        print(fuse.report().summary)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
