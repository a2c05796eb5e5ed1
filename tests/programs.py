"""Compiling a program far enough to look at what the passes made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fuse import passes
from fuse.ir.spec import AttentionSpec
from fuse.report.site import Reading, Site


@dataclass(frozen=True)
class Call:
    """What one fused site was called with."""

    spec: AttentionSpec
    operands: list[Tensor]
    sizes: list[int]


class Calling(Interpreter):
    """Runs a graph and keeps the calls of fused sites."""

    def __init__(self, graph: GraphModule, calls: list[Call]) -> None:
        super().__init__(graph)
        self.calls = calls

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.fuse.attention.default:
            operands, sizes, text, _ = args
            self.calls.append(Call(AttentionSpec.from_json(text), operands, sizes))
        return super().call_function(target, args, kwargs)


@dataclass(frozen=True)
class Passed:
    """The graph after the passes, the sites that they report, what the graph computes, and the calls of fused sites in it."""

    graph: GraphModule
    sites: list[Site]
    result: Any
    calls: list[Call]

    @property
    def spec(self) -> AttentionSpec:
        (site,) = self.sites
        assert site.fused and site.spec is not None, site.reason
        return site.spec


def pass_over(program: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> Passed:
    """Runs Dynamo and the passes on ``program(*args)``, and its graph eagerly."""
    found: list[tuple[GraphModule, Reading]] = []
    calls: list[Call] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, passes.run(gm, lambda device: "reference")))
        return Calling(gm, calls).run

    with torch.no_grad():
        result = torch.compile(program, backend=backend, dynamic=dynamic)(*args, **kwargs)
    ((graph, reading),) = found
    return Passed(graph, list(reading.sites), result, calls)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / 4 + mask) v on (..., L, 16)."""
    score = q @ k.transpose(-1, -2) / 4
    return (score if mask is None else score + mask).softmax(-1) @ v


def heads(length: int = 9, kv_len: int | None = None, batch: int = 2, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value of shape (batch, count, length, 16)."""
    lengths = (length, kv_len or length, kv_len or length)
    q, k, v = (torch.randn(batch, count, n, 16) for n in lengths)
    return q, k, v


def computed(passed: Passed) -> dict[Node, Tensor]:
    """What each call of the graph gives, on inputs of zeros."""
    values: dict[Node, Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op.startswith("call"):
                values[n] = value
            return value

    inputs = [n.meta["example_value"] for n in passed.graph.graph.find_nodes(op="placeholder")]
    Recorder(passed.graph).run(*(torch.zeros(x.shape, dtype=x.dtype) for x in inputs))
    return values


def square(passed: Passed, entries: int) -> list[str]:
    """Calls beside attention that allocate as many entries."""
    sizes = {n: t.untyped_storage().nbytes() // t.element_size() for n, t in computed(passed).items()}
    return [n.name for n, size in sizes.items() if size >= entries and n not in attention_calls(passed)]


def attention_calls(passed: Passed) -> list[Node]:
    return list(passed.graph.graph.find_nodes(op="call_function", target=torch.ops.fuse.attention.default))
