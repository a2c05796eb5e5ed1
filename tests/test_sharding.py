"""fuse's ops on DTensors: parts of the batch and of the heads stay on their ranks, all else is as for plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from specs import CASES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fuse
from fuse.ops import attention  # noqa: F401  it registers the ops

HEADS, KEYS, WIDTH = 4, 2, 16
OF_2_11 = torch.__version__.startswith("2.11.")
FLATTENED = "torch 2.11 multiplies no DTensors of four dimensions that lie divided by heads"
Placements = Sequence[Placement]
Way = Callable[[nn.Module, Tensor], Tensor]  # shards a model, and gives its input


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def plain(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


# ----------------------------------------------------------------------------------------------------------------- ops


def call(name: str, ways: Sequence[Placements], shape: tuple[int, ...]) -> tuple[int, list[Placement], float, float]:
    """The op forward and backward on operands that lie in these ``ways`` on a mesh of that ``shape``, beside plain tensors:
    collectives of the forward pass, how the result lies, and differences of it and of gradients."""
    mesh, p = init_device_mesh("cpu", shape), CASES[name]("float64")
    lying = [distribute_tensor(t, mesh, way).requires_grad_() for t, way in zip(p.operands, ways, strict=True)]
    own = [plain(t) for t in p.operands]
    op = torch.ops.fuse.attention.default
    with CommDebugMode() as comm:
        out = op(lying, p.sizes, p.spec.to_json(), "reference")
    expected = op(own, p.sizes, p.spec.to_json(), "reference")
    weights = torch.randn_like(expected)
    (whole(out) * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = max(float((whole(a.grad) - b.grad).abs().max()) for a, b in zip(lying, own, strict=True))
    return comm.get_total_counts(), list(out.placements), float((whole(out) - expected).abs().max()), gradients


ALL = Replicate()
OPS: dict[str, tuple[str, list[Placements], tuple[int, ...], int, Placements]] = {
    "the batch": ("plain", [[Shard(0)]] * 3, (2,), 0, [Shard(0)]),
    "heads that share keys": ("grouped_query", [[Shard(1)]] * 3, (2,), 0, [Shard(1)]),
    "the batch, with numbers that all ranks have": ("alibi", [[Shard(0)]] * 3 + [[ALL]], (2,), 0, [Shard(0)]),
    "batch and heads": ("grouped_query", [[Shard(0), Shard(1)]] * 3, (2, 2), 0, [Shard(0), Shard(1)]),
    "three heads on two ranks": ("plain", [[Shard(1)]] * 3, (2,), 3, [ALL]),
    "the sequence": ("plain", [[Shard(2)]] * 3, (2,), 3, [ALL]),
    "queries by heads, keys whole": ("grouped_query", [[Shard(1)], [ALL], [ALL]], (2,), 0, [Shard(1)]),
}


def call_all() -> dict[str, tuple[int, list[Placement], float, float]]:
    torch.manual_seed(0)
    ranks = dist.get_world_size()
    return {name: call(of, ways, shape) for name, (of, ways, shape, *_) in OPS.items() if torch.Size(shape).numel() == ranks}


@pytest.mark.parametrize("ranks", [2, 4])
def test_operands_are_moved_only_where_the_spec_needs_them_whole(ranks: int) -> None:
    for found in run_ranks(call_all, ranks):
        assert found
        for name, (moved, lies, out, gradient) in found.items():
            assert (moved, lies) == (OPS[name][3], list(OPS[name][4])), name
            assert out < 1e-12 and gradient < 1e-12, (name, out, gradient)


# -------------------------------------------------------------------------------------------------------------- models


class Attention(nn.Module):
    """Grouped queries, written out."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.q, self.out = nn.Linear(64, HEADS * WIDTH, bias=False), nn.Linear(HEADS * WIDTH, 64, bias=False)
        self.k, self.v = (nn.Linear(64, KEYS * WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, -1, WIDTH).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        k, v = (self.shared(t) for t in (k, v))
        prob = nn.functional.dropout((q @ k.mT * WIDTH**-0.5).softmax(-1), self.dropout)
        mixed: Tensor = self.out((prob @ v).transpose(1, 2).reshape(batch, length, HEADS * WIDTH))
        return mixed

    def shared(self, x: Tensor) -> Tensor:
        batch, keys, length, _ = x.shape
        wide = x[:, :, None].expand(batch, keys, HEADS // KEYS, length, WIDTH)
        return wide.reshape(batch, HEADS, length, WIDTH)


def by_heads(model: nn.Module, x: Tensor) -> Tensor:
    columns = dict.fromkeys("qkv", ColwiseParallel(use_local_output=False))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {**columns, "out": RowwiseParallel()})
    return x


def by_batch(model: nn.Module, x: Tensor) -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    distribute_module(model, mesh)
    return distribute_tensor(x, mesh, [Shard(0)])


def train(shard: Way, inner: str, target: str) -> tuple[int, float, float]:
    """Sites that are read as attention, and how far the result and gradients are from eager's of the whole."""
    torch._dynamo.reset()
    fuse.reset()
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 20, 64)
    expected = model(x)
    expected.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    given = shard(model, x)
    out = whole(torch.compile(model, backend="fuse", options={"inner": inner, "target": target})(given))
    out.square().mean().backward()
    far = [float((whole(p.grad) - g).abs().max() / g.abs().max()) for p, g in zip(model.parameters(), gradients, strict=True)]
    return fuse.report().recovered, float((out - expected).abs().max()), max(far)


def train_all(shard: Way, ways: Sequence[tuple[str, str]]) -> list[tuple[int, float, float]]:
    return [train(shard, inner, target) for inner, target in ways]


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("shard", "ways"),
    [
        (by_batch, [("inductor", "cpp")]),
        pytest.param(
            by_heads, [("aot_eager", "cpp"), ("eager", "reference")], marks=pytest.mark.skipif(OF_2_11, reason=FLATTENED)
        ),
    ],
)
def test_attention_of_dtensors_is_fused_on_every_rank(shard: Way, ways: Sequence[tuple[str, str]]) -> None:
    for found in run_ranks(train_all, 2, shard, ways):
        for fused, out, gradient in found:
            assert fused == 1
            assert out < 1e-6 and gradient < 1e-5


def raised() -> list[str]:
    found = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="fuse")):
        model = Attention()
        given = by_heads(model, torch.randn(4, 20, 64))
        with pytest.raises(Exception) as error:
            wrap(model)(given)
        found.append(str(error.value))
    return found


@pytest.mark.skipif(not OF_2_11, reason="later torch multiplies them")
def test_where_torch_cannot_multiply_dtensors_its_error_says_so() -> None:
    for found in run_ranks(raised, 2):
        assert all("Attempted to flatten multiple dimensions, with dimension 1 being sharded" in text for text in found)


def declined() -> list[Any]:
    model = Attention(dropout=0.5)
    given = by_batch(model, torch.randn(4, 20, 64))
    report = fuse.explain(model, given)
    dist.barrier()
    return [str(site.reason) for site in report.sites]


def test_dropout_of_dtensors_is_left_to_torch() -> None:
    assert run_ranks(declined, 2) == [["its tensors are DTensors, and dropout draws for each rank in torch's own way"]] * 2
