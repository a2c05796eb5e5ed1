"""Triton compiles when a kernel is launched first. What the first calls of a graph will launch is compiled beforehand, in
parallel and beside the inner compiler: by calls with meta tensors, which launch nothing (fuse.targets.triton.function).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fuse import targets
from fuse.ops.attention import parsed

log = logging.getLogger("fuse")


@dataclass(frozen=True)
class ExpectedCall:
    """What one node will be called with: meta tensors, the values of the spec's symbols, and where the tensors will be."""

    spec: str
    target: str
    operands: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    device: torch.device

    @property
    def key(self) -> tuple[object, ...]:
        return (self.spec, self.sizes, self.device, *((t.shape, t.stride()) for t in self.operands))


def calls(gm: GraphModule) -> Iterator[ExpectedCall]:
    """Of every attention in the graph and in the graphs inside it whose shapes are known or hinted at; equal ones once."""
    seen = set()
    for module in gm.modules():
        if isinstance(module, GraphModule):
            ops = (torch.ops.fuse.attention.default, torch.ops.fuse.attention_lse.default)
            for node in (n for op in ops for n in module.graph.find_nodes(op="call_function", target=op)):
                call = expected(node)
                if call is not None and call.key not in seen:
                    seen.add(call.key)
                    yield call


def expected(node: Node) -> ExpectedCall | None:
    """The call of one node; None where its shapes are not known."""
    leaves: Any
    sizes: Any
    leaves, sizes, spec, target = node.args
    fakes = [_fake(leaf) for leaf in leaves]
    values = [_number(n.meta.get("example_value") if isinstance(n, Node) else n) for n in sizes]
    if not fakes or None in values or not all(isinstance(fake, Tensor) for fake in fakes):
        return None
    shapes = [[_number(n) for n in (*fake.shape, *fake.stride())] for fake in fakes]
    if any(None in shape for shape in shapes):
        return None
    metas = (
        torch.empty_strided(shape[: fake.dim()], shape[fake.dim() :], dtype=fake.dtype, device="meta")  # type: ignore[arg-type]
        for fake, shape in zip(fakes, shapes, strict=True)
    )
    return ExpectedCall(str(spec), str(target), tuple(metas), tuple(values), fakes[0].device)  # type: ignore[arg-type]


def _fake(node: Node) -> Any:
    """What a node holds; of those that passes have made, what they would."""
    if "example_value" in node.meta or node.op != "call_function":
        return node.meta.get("example_value")
    args, kwargs = map_arg((node.args, node.kwargs), _fake)
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # of values that nobody knows
        return None


def _number(n: Any) -> int | None:
    """A size, or what a symbolic one is in the call that was compiled."""
    value = n.node.hint if isinstance(n, SymInt) else n
    return int(value) if isinstance(value, int) else None


def compile_for(call: ExpectedCall, wanted: tuple[bool, ...]) -> None:
    """With the log-sum-exp and the gradients where any are ``wanted``. It costs nobody a call if that fails."""
    spec = parsed(call.spec)
    try:
        with torch.cuda.device(call.device) if call.device.type == "cuda" else nullcontext():
            kernel = targets.kernel(spec, call.target)
            if kernel.source is None:
                return
            if not any(wanted):
                kernel(call.operands, call.sizes)
                return
            out, lse = kernel.forward(call.operands, call.sizes)
            targets.backward_kernel(spec, call.target, wanted)(out, call.operands, call.sizes, out, lse)
    except Exception:
        log.debug("compiling beforehand failed; the first call will tell why if it matters", exc_info=True)
