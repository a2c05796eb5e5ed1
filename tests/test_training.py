"""What training loops do around a model, with fused attention in it: each gives what eager gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import attend, heads
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fuse

INNERS = ("aot_eager", "inductor")


class Model(nn.Module):
    """Two layers of attention with a learned bias over positions, a learned temperature and a sink."""

    def __init__(self, around: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) if self.around is None else self.around(layer, x))
        return x.square().mean()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)
        self.bias, self.sink = nn.Parameter(torch.randn(3, 9, 9)), nn.Parameter(torch.randn(3))
        self.temperature = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
        score = q @ k.mT / self.temperature + self.bias
        sink = self.sink.to(score.dtype).view(3, 1, 1).expand(*score.shape[:-1], 1)
        weight = torch.cat((score, sink), -1).softmax(-1)[..., :-1]
        out: Tensor = self.out((weight.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


def model(seed: int = 0, around: Callable[..., Any] | None = None) -> Model:
    torch.manual_seed(seed)
    return Model(around)


def compiled(program: Callable[..., Any], inner: str) -> Callable[..., Any]:
    return torch.compile(program, backend="fuse", options={"inner": inner, "target": "reference"})


def batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(2, 9, 48, generator=generator)


Train = Callable[[nn.Module, Callable[..., Any]], Any]


def same(
    train: Train, inner: str = "aot_eager", fused: int = 2, around: Callable[..., Any] | None = None, **close: float
) -> None:
    """``train`` leaves the parameters and gradients of a model, and returns, what it does with the eager one."""
    eager, other = model(around=around), model(around=around)
    expected, found = train(eager, eager), train(other, compiled(other, inner))
    assert fuse.report().recovered == fused and len(fuse.report().sites) == fused
    close = close or {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **close)  # type: ignore[arg-type]
    for (name, p), (_, e) in zip(other.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, e.grad, msg=lambda m, n=name: f"{n}.grad: {m}", **close)  # type: ignore[arg-type]
        torch.testing.assert_close(p, e, msg=lambda m, n=name: f"{n}: {m}", **close)  # type: ignore[arg-type]


def steps(net: nn.Module, run: Callable[..., Any]) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for x in batches(3):
        optimizer.zero_grad()
        loss = run(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("inner", INNERS)
def test_steps_of_an_optimizer(inner: str) -> None:
    same(steps, inner)


def test_gradients_accumulate_over_batches() -> None:
    def train(net: nn.Module, run: Callable[..., Any]) -> None:
        for x in batches(3):
            run(x).backward()

    same(train)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_autocast(inner: str, inside: bool) -> None:
    """In bfloat16, where eager's rounding is most of the difference: closeness is that of the dtype."""

    @contextmanager
    def ambient() -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    def around(layer: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    def train(net: nn.Module, run: Callable[..., Any]) -> None:
        for x in batches(1):
            if inside:
                run(x).backward()
            else:
                with ambient():
                    loss = run(x)
                loss.backward()

    same(train, inner, around=around if inside else None, rtol=5e-2, atol=2e-3)


@pytest.mark.parametrize("start", [2.0**10, 2.0**127], ids=["calm", "overflow"])
def test_a_gradient_scaler(start: float) -> None:
    """Where gradients overflow, the step is skipped and the scale is halved."""

    def train(net: nn.Module, run: Callable[..., Any]) -> list[tuple[bool, float]]:
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=start)
        scales = []
        for x in batches(2):
            optimizer.zero_grad()
            scaler.scale(run(x)).backward()
            finite = all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
            scaler.step(optimizer)
            scaler.update()
            scales.append((finite, scaler.get_scale()))
        optimizer.zero_grad()
        return scales

    same(train)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant: bool, inner: str) -> None:
    def around(layer: nn.Module, x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    def train(net: nn.Module, run: Callable[..., Any]) -> None:
        for x in batches(2):
            run(x.requires_grad_()).backward()

    same(train, inner, around=around)


def test_a_selective_checkpoint_may_name_the_op() -> None:
    seen: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "attention_forward" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def around(layer: nn.Module, x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False, context_fn=contexts)

    def train(net: nn.Module, run: Callable[..., Any]) -> None:
        for x in batches(1):
            run(x).backward()

    same(train, around=around)
    assert "fuse.attention_forward.default" in seen


@pytest.mark.parametrize("frozen", ["qkv", "bias", "temperature", "sink", "all but out"])
def test_frozen_parameters(frozen: str) -> None:
    def train(net: nn.Module, run: Callable[..., Any]) -> None:
        for name, p in net.named_parameters():
            p.requires_grad_(".out." in name if frozen == "all but out" else frozen not in name)
        for x in batches(1):
            run(x).backward()

    same(train)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_frozen_query_key_or_value(number: int) -> None:
    x = [t.requires_grad_(i != number) for i, t in enumerate(heads())]
    wanted = [t for t in x if t.requires_grad]
    found = torch.autograd.grad(compiled(attend, "aot_eager")(*x).square().sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(attend(*x).square().sum(), wanted), rtol=1e-4, atol=1e-5)
    (site,) = fuse.report().sites
    assert site.wanted == tuple(i != number for i in range(3))


def test_a_layer_under_no_grad_gets_none_and_the_next_its_own() -> None:
    def around(layer: nn.Module, x: Tensor) -> Any:
        with torch.set_grad_enabled(layer.temperature.requires_grad):
            return layer(x)

    def train(net: nn.Module, run: Callable[..., Any]) -> None:
        net.get_submodule("layers.0").requires_grad_(False)
        for x in batches(1):
            run(x).backward()

    same(train, around=around)


def test_evaluation_between_steps_and_back() -> None:
    def train(net: nn.Module, run: Callable[..., Any]) -> list[float]:
        losses = []
        for x in batches(2):
            run(x).backward()
            with torch.no_grad():
                losses.append(run(x).item())
        return losses

    same(train, fused=4)


def test_a_graph_that_is_retained() -> None:
    def train(net: nn.Module, run: Callable[..., Any]) -> None:
        for x in batches(1):
            loss = run(x)
            loss.backward(retain_graph=True)
            loss.backward()

    same(train)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_ddp_reduces_the_gradients_of_captured_parameters() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        eager, net = model(), model()
        wrapped, called = nn.parallel.DistributedDataParallel(net), []

        def doubled(bucket: Any) -> Any:
            called.append(bucket.index())
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer() * 2)
            return done

        wrapped.register_comm_hook(None, lambda state, bucket: doubled(bucket))
        for x in batches(1):
            eager(x).backward()
            compiled(wrapped, "aot_eager")(x).backward()
        assert called and fuse.report().recovered == 2
        for p, e in zip(net.parameters(), eager.parameters(), strict=True):
            assert p.grad is not None and e.grad is not None
            torch.testing.assert_close(p.grad, 2 * e.grad, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inner", INNERS)
def test_a_second_derivative_is_refused_by_aotautograd(inner: str) -> None:
    q, k, v = (x.requires_grad_() for x in heads())
    loss = compiled(attend, inner)(q, k, v).square().sum()
    with pytest.raises(Exception, match="double backward"):
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        grad.sum().backward()


def test_deterministic_algorithms_give_the_same_bits_twice() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            net = model()
            for x in batches(1):
                compiled(net, "aot_eager")(x).backward()
            grads.append([p.grad for p in net.parameters()])
        for first, second in zip(*grads, strict=True):
            assert first is not None and second is not None and torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_under_symbolic_sizes_compiles_once() -> None:
    q, k, v = (x.requires_grad_() for x in heads())
    run = torch.compile(attend, backend="fuse", dynamic=True, options={"inner": "aot_eager", "target": "reference"})
    for length in (8, 7, 5):
        x = [t[:, :, :length] for t in (q, k, v)]
        found = torch.autograd.grad(run(*x).square().sum(), (q, k, v))
        expected = torch.autograd.grad(attend(*x).square().sum(), (q, k, v))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert fuse.report().recovered == 1


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_draws_the_dropout_of_its_forward_pass_again(use_reentrant: bool, inner: str) -> None:
    """Gradients are those of the mask that forward drew, which values that are an identity show.

    Not those without the checkpoint: from one seed, Inductor of torch 2.15 draws other numbers inside of one than outside.
    """

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.dropout((q @ k.mT / 4).softmax(-1), 0.4) @ v

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = checkpoint(dropped, q, k, v, use_reentrant=use_reentrant)
        return out

    run = compiled(again, inner)
    q, k, v = (t.requires_grad_() for t in heads(16))
    identity = torch.eye(16).expand_as(v).contiguous().requires_grad_()
    torch.manual_seed(3)
    kept = run(q, k, identity) != 0
    assert 0.5 < kept.float().mean() < 0.7
    torch.manual_seed(3)
    found = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    expected = torch.autograd.grad((((q @ k.mT / 4).softmax(-1) * kept / 0.6) @ v).square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (len(fuse.report().sites), fuse.report().recovered) == (1, 1)


def test_a_second_process_takes_its_graphs_from_torch_s_caches_and_gives_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("train_once.py"))]
    first, second = (
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split() for _ in range(2)
    )
    assert first[1:] == ["1", "0", "0"]
    assert second == [first[0], "1", "1", "2"]  # AOTAutograd's entry, and the forward and the backward graph in it


@pytest.mark.compiler
@pytest.mark.parametrize("learned", [False, True])
def test_a_mask_that_is_written_after_its_use_is_what_it_was_in_the_backward_pass(learned: bool) -> None:
    """Inductor computes copies again where that is cheap, from an input that holds something else by then."""

    def program(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        score = q @ k.mT / 4 + mask
        mask.fill_(3.0)
        return score.softmax(-1) @ v

    def gradients(f: Callable[..., Any]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        leaves = [torch.randn(2, 3, 9, 16, requires_grad=True) for _ in range(3)] + [torch.randn(9, 9, requires_grad=learned)]
        return torch.autograd.grad(f(*leaves[:3], leaves[3] * 1).square().sum(), leaves[: 3 + learned])

    torch.testing.assert_close(gradients(compiled(program, "inductor")), gradients(program), rtol=1e-4, atol=1e-5)
    assert fuse.report().recovered == 1


def test_a_result_may_be_written_before_the_backward_pass() -> None:
    """By whoever gets it from the graph: eager's backward pass does not read it."""
    inputs, grads = heads(), []
    for run in (attend, compiled(attend, "eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = run(*leaves)
        out.mul_(2)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
