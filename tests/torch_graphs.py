"""What torch gives to a backend, and to a function under a transform, to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node


class Look(list[Any]):
    """The identity, which keeps what ``of`` says of each argument."""

    def __init__(self, of: Callable[[Any], Any]) -> None:
        super().__init__()
        self._of = of

    def __call__(self, x: Any) -> Any:
        self.append(self._of(x))
        return x


def given_to_backend(f: Callable[..., Any], *args: Any, dynamic: bool = False, look: Callable[[GraphModule], Any] = id) -> Any:
    """Dynamo's graph of a call; ``look`` is called with it while it is compiled."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        look(gm)
        graphs.append(gm)
        return gm.forward

    torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (gm,) = graphs
    return gm


def placeholders(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="placeholder"))
