"""Compiling a program far enough to look at what the passes made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fuse import passes
from fuse.options import Options
from fuse.site import Site
from fuse.spec import AttentionSpec


@dataclass(frozen=True)
class Passed:
    """The graph after the passes, the sites that they report, and what the graph computes."""

    graph: GraphModule
    sites: list[Site]
    result: Any

    @property
    def spec(self) -> AttentionSpec:
        (site,) = self.sites
        assert site.fused and site.spec is not None, site.reason
        return site.spec


def pass_over(program: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> Passed:
    """Runs Dynamo and the passes on ``program(*args)``, and its graph eagerly."""
    found: list[tuple[GraphModule, list[Site]]] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, passes.run(gm, Options(target="reference"))))
        return gm.forward

    with torch.no_grad():
        result = torch.compile(program, backend=backend, dynamic=dynamic)(*args, **kwargs)
    ((graph, sites),) = found
    return Passed(graph, sites, result)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / 4 + mask) v on (..., L, 16)."""
    score = q @ k.transpose(-1, -2) / 4
    return (score if mask is None else score + mask).softmax(-1) @ v


def heads(length: int = 9, kv_len: int | None = None, batch: int = 2, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value of shape (batch, count, length, 16)."""
    lengths = (length, kv_len or length, kv_len or length)
    q, k, v = (torch.randn(batch, count, n, 16) for n in lengths)
    return q, k, v
