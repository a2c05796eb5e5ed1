"""A graph of little work, as a whole: is it faster compiled, or operator by operator?

What a compiled graph costs by itself, whoever compiles it, is more than the attention of a few tokens takes: its wrappers, of
two graphs in training, and what autograd saves between them. That cannot be seen at a site.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fuse.passes.read.graph import PLAIN, is_torchs, writes
from fuse.qualify import faster, verdict
from fuse.qualify.verdict import Verdict
from fuse.torch_private import disable_current_modes, saves_by_hooks

log = logging.getLogger(__name__)
_BYTES = 4 * 2**20  # of all inputs: a graph with more has work that outweighs what it costs by itself
_LITTLE = 1e-2  # seconds of a call, of which what a graph costs by itself is too little to be told from noise
_ROUNDS = 25  # more than at a site: the first calls of what has just been compiled take half as long again
Graph = Callable[..., Sequence[Any]]


def is_little(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether ``gm`` may be tried, beside its own calls, on copies of its inputs: it is small, it is on a CPU, its sizes are
    fixed, it calls nothing but torch, and it writes to none of its inputs.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    fixed = len(tensors) == len(inputs) and all(type(n) is int for t in tensors for n in (*t.shape, *t.stride()))
    known = all(type(t) in PLAIN and t.device.type == "cpu" and t.layout == torch.strided for t in tensors)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if not (fixed and known and alone) or sum(t.numel() * t.element_size() for t in tensors) > _BYTES:
        return False
    return all(n.op in ("placeholder", "output") or (is_torchs(n) and not writes(n)) for n in gm.graph.nodes)


@dataclass
class Contest:
    """``compiled`` until the first call, which decides between it and ``plain``, the graph as it was.

    compiler  what ``compiled`` depends on beside the graph
    left      is told why, once ``plain`` has won
    """

    compiled: Graph
    plain: GraphModule
    compiler: str
    left: Callable[[str], None]

    def __post_init__(self) -> None:
        self._run: Graph | None = None

    def __call__(self, *args: Any) -> Sequence[Any]:
        return (self._run or self._first(args))(*args)

    def _first(self, args: Sequence[Any]) -> Graph:
        """What runs; decided by the first call whose tensors nobody else keeps, as activation checkpointing does."""
        if saves_by_hooks() or not all(type(x) in PLAIN for x in args):
            return self.compiled
        step = verdict.step_of(self.plain.code, args, self.compiler)
        found = verdict.read(step)
        if found is None:
            found = self._judged(args)
            verdict.write(step, found)
        self._run = self.compiled if found.kind == "kept" else self.plain.forward
        if found.kind != "kept":
            self.left(found.why)
        return self._run

    def _judged(self, args: Sequence[Tensor]) -> Verdict:
        try:
            return self._timed(args)
        except Exception:  # what cannot be tried runs as it was compiled
            log.debug("a graph could not be timed beside its operators", exc_info=True)
            return Verdict("kept")

    def _timed(self, args: Sequence[Tensor]) -> Verdict:
        with disable_current_modes(), torch.random.fork_rng(devices=[]):
            inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in args]
            ways = [partial(_step, graph, inputs) for graph in (self.compiled, self.plain.forward)]
            ours, others = faster.in_turn(ways, torch.device("cpu"), _ROUNDS)
        times = faster.Times(ours, others, "its graph, operator by operator")
        return Verdict("slower" if times.lost and others <= _LITTLE else "kept", str(times))


def _step(graph: Graph, inputs: Sequence[Tensor]) -> object:
    """A call, with all gradients that it has."""
    out = [x for x in graph(*inputs) if isinstance(x, Tensor) and x.requires_grad]
    wanting = [x for x in inputs if x.requires_grad]
    if not out:
        return out
    return torch.autograd.grad(out, wanting, [torch.ones_like(x) for x in out], allow_unused=True)
