"""A call that can be made again and again: a model's results, or a step of training with its gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fuse.models import ModelCall
from fuse.torch_private import pytree

_A_WHILE = 0.05  # seconds


class Step:
    """``run`` is ``call.model``, or what a compiler made of it."""

    def __init__(self, call: ModelCall, run: Callable[..., Any], train: bool) -> None:
        self._call, self._run, self._train = call, run, train
        self._directions: list[Tensor] = []
        self.device = next((x.device for x in _tensors((call.args, call.kwargs))), torch.device("cpu"))

    def __call__(self) -> list[Tensor]:
        """The floating-point tensors of the result, and in training the gradients of parameters and inputs."""
        with torch.inference_mode(not self._train):
            results = _floats(self._run(*self._call.args, **self._call.kwargs))
        return [x.detach() for x in (*results, *self._gradients(results))] if self._train else results

    def seconds(self) -> float:
        """Of a call, on average over as many as take a while."""
        spent, calls = 0.0, 0
        while spent < _A_WHILE:
            spent, calls = spent + self.timed()[0], calls + 1
        return spent / calls

    def timed(self) -> tuple[float, list[Tensor]]:
        self._wait()
        start = time.perf_counter()
        results = self()
        self._wait()
        return time.perf_counter() - start, results

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _gradients(self, results: Sequence[Tensor]) -> Iterator[Tensor]:
        """In a direction that is the same in every process; of a sum of results it would often be zero."""
        differentiable = [x for x in results if x.requires_grad]
        if not self._directions:
            draw = torch.Generator().manual_seed(0)
            self._directions = [torch.randn(x.shape, generator=draw).to(x.device, x.dtype) for x in differentiable]
        for leaf in self._leaves():
            leaf.grad = None
        torch.autograd.backward(differentiable, self._directions)
        yield from (leaf.grad for leaf in self._leaves() if leaf.grad is not None)

    def _leaves(self) -> Iterator[Tensor]:
        model = self._call.model
        yield from model.parameters() if isinstance(model, torch.nn.Module) else ()
        yield from (x for x in _tensors((self._call.args, self._call.kwargs)) if x.requires_grad and x.is_leaf)


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    """Of all together in the Euclidean norm; None where they are not of the same shapes."""
    if not exact or [x.shape for x in results] != [x.shape for x in exact]:
        return None
    wrong = sum((torch.linalg.vector_norm(r.cpu().double() - e) ** 2).item() for r, e in zip(results, exact, strict=True))
    right = sum((torch.linalg.vector_norm(e) ** 2).item() for e in exact)
    return float((wrong / right) ** 0.5) if right else None


def _floats(result: Any) -> list[Tensor]:
    return [x for x in _tensors(result) if x.is_floating_point()]


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))
