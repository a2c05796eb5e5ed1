"""Is a kernel faster than what torch has? Both in turn, at the sizes of the call."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuse.ops.attention import parsed
from fuse.ops.warm import ExpectedCall
from fuse.ops.written import caller
from fuse.passes.find import ATTENTION
from fuse.qualify.problem import Problem, whole
from fuse.qualify.torchs_own import rival
from fuse.torch_private import make_fx

SDPA, PLAIN, PRODUCTS = ATTENTION, "plain operations", "two products"
_MARGIN = 1.05  # by how much a kernel has to lose: benchmarks/never_slower.py asks for no less
_CLEAR = 2.0  # by how much it may win at once
_ROUNDS, _LEAST, TRIALS = 5, 2e-3, 2  # in turn; seconds of one way in a round; measurements, all of which it has to lose
_SHORT = 5e-3  # seconds of a call to which it matters what another way has left in the caches
_MEMORY = 0.25  # of what is free: more than that is not taken to hold scores
Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of a call, with its gradients where they are wanted, by fuse and by ``other``."""

    fuse: float
    other: float
    name: str

    @property
    def lost(self) -> bool:
        return self.fuse > _MARGIN * self.other

    def __str__(self) -> str:
        return f"{self.name}: {milliseconds(self.other)}, fuse {milliseconds(self.fuse)}"


def times(call: ExpectedCall, wanted: Sequence[bool], called: bool, traced: bool = True) -> Times | None:
    """None where there is nothing to compare with: torch has no such call, or it would need too much memory.

    called  whether the site is a call of SDPA; else its operations are what it is beside
    traced  whether Inductor will write the calls of the kernels, in which no autograd is left
    """
    if not fits(call):
        return None
    problem = whole(call, wanted)
    found = rival(problem, wanted, bool(call.weights))
    if found is None:
        return None
    direct = traced and not call.weights
    with nullcontext() if called else sdpa_kernel(SDPBackend.MATH):
        ours = (_traced if direct else _called)(call, problem, wanted)
        theirs = way(found.attend, found.matrices, found.wanted, direct)
        for _ in range(TRIALS):
            mine, other = in_turn((ours, theirs), call.device)
            measured = Times(mine, other, SDPA if called else PLAIN)
            if not measured.lost:
                break
    return measured


def _called(call: ExpectedCall, problem: Problem, wanted: Sequence[bool]) -> Call:
    ops: Any = torch.ops.fuse
    if not call.weights:
        return way(lambda *t: ops.attention(t, problem.sizes, call.spec, call.target), problem.operands, wanted)

    def attend(*operands: Tensor) -> Tensor:
        out, _, lse = ops.attention_rows(operands, problem.sizes, call.spec, call.target)
        for matrix, heads in call.weights:
            ops.attention_weights(operands, lse, problem.sizes, matrix, call.target, heads)
        return out  # type: ignore[no-any-return]

    return way(attend, problem.operands, wanted)


def _traced(call: ExpectedCall, problem: Problem, wanted: Sequence[bool]) -> Call:
    operands, sizes = [t.detach() for t in problem.operands], list(problem.sizes)
    if not any(wanted):
        return partial(caller("attention", call.spec, call.target), operands, sizes)
    forward, backward = (caller(f"attention_{part}", call.spec, call.target) for part in ("forward", "backward"))
    grad = torch.ones_like(forward(operands, sizes)[0])

    def run() -> object:
        out, lse = forward(operands, sizes)
        return backward(grad, operands, sizes, out, lse, list(wanted))

    return run


def way(attend: Callable[..., Tensor], tensors: Sequence[Tensor], wanted: Sequence[bool], direct: bool = False) -> Call:
    """A call, with its gradients where they are wanted; ``direct``: by the operators that Inductor calls for them, in which no
    autograd is left."""
    leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    if not any(wanted):
        return partial(torch.no_grad()(attend), *leaves)
    step: Callable[..., object] = partial(_step, attend, torch.ones_like(attend(*leaves)))
    return partial(torch.no_grad()(make_fx(step)(*leaves).forward) if direct else step, *leaves)


def _step(attend: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(attend(*leaves), [t for t in leaves if t.requires_grad], grad)


def in_turn(ways: Sequence[Call], device: torch.device, rounds: int = _ROUNDS) -> tuple[float, ...]:
    """Seconds of each in one round: that in the middle, by the first's over the fastest of the others. A machine that others
    use too is at times faster and at times slower for all that a round calls, but the shortest time of one way may be of
    another moment than that of the other. Fuse, the first, may win at once.

    Rounds go forth and back: who comes after much memory was given back has it to fetch again.
    """
    seconds = _on_gpu if device.type == "cuda" else _on_cpu
    for way in ways:
        seconds(way, 1)
    first = [seconds(way, 1) for way in ways]
    if first[0] * _CLEAR < min(first[1:], default=0.0):
        return tuple(first)
    found = []
    for turn in range(rounds):
        taken = list(first)
        for i in range(len(ways))[:: -1 if turn % 2 else 1]:
            taken[i] = seconds(ways[i], max(2 if first[i] < _SHORT else 1, int(_LEAST / first[i])))
        found.append(tuple(taken))
    return sorted(found, key=lambda round: round[0] / min(round[1:], default=1.0))[rounds // 2]


def _on_cpu(call: Call, count: int) -> float:
    """After a call that finds in the caches what another way has left there."""
    if count > 1:
        call()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _on_gpu(call: Call, count: int) -> float:
    """By the device's own clock; that of the current device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    seconds: float = begin.elapsed_time(end) / 1e3 / count
    return max(seconds, 1e-7)


def fits(call: ExpectedCall) -> bool:
    """Whether there is memory for all scores of a call."""
    return _bytes_of_scores(call) <= _MEMORY * _free(call.device)


def _bytes_of_scores(call: ExpectedCall) -> int:
    """Of scores, probabilities and their gradients, in float32."""
    return 4 * 4 * math.prod(call.sizes[: parsed(call.spec).batch + 2])


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    known = "SC_AVPHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else math.inf


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
