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
from fuse.torch_private import hint

_fuse: Any = torch.ops.fuse
log = logging.getLogger("fuse")


@dataclass(frozen=True)
class ExpectedCall:
    """What one node will be called with: meta tensors, the values of the spec's symbols, and where the tensors will be.

    weights  the spec and the number of heads of each matrix that is written beside the result
    """

    spec: str
    target: str
    operands: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    device: torch.device
    weights: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        return (self.spec, self.sizes, self.device, self.weights, *((t.shape, t.stride()) for t in self.operands))


def calls(gm: GraphModule) -> Iterator[ExpectedCall]:
    """Of every attention in the graph and in the graphs inside it whose shapes are known or hinted at; equal ones once."""
    seen = set()
    for module in gm.modules():
        if isinstance(module, GraphModule):
            ops = (_fuse.attention.default, _fuse.attention_lse.default, _fuse.attention_rows.default)
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
    metas, values = [_held(leaf) for leaf in leaves], [_held(n) if isinstance(n, Node) else n for n in sizes]
    devices = [device for leaf in leaves if (device := _device(leaf)) is not None]
    if not devices or not all(isinstance(m, Tensor) for m in metas) or not all(isinstance(n, int) for n in values):
        return None
    return ExpectedCall(str(spec), str(target), tuple(metas), tuple(values), devices[0], tuple(_weights(node)))


def _weights(node: Node) -> Iterator[tuple[str, int]]:
    """What is written beside the result of the node."""
    for user in (u for item in node.users for u in item.users if u.target is _fuse.attention_weights.default):
        spec, heads = user.args[3], user.args[5]
        yield str(spec), _held(heads) if isinstance(heads, Node) else heads  # type: ignore[misc]


def _device(node: Node) -> torch.device | None:
    """Where a tensor is, or what it is made of."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        return value.device
    return next((device for x in node.all_input_nodes if (device := _device(x)) is not None), None)


def _held(node: Node) -> Any:
    """What a node holds, a meta tensor or a number, and of those that passes have made, what they would; None if not known."""
    if "example_value" in node.meta or node.op != "call_function":
        return _hinted(node.meta.get("example_value"))
    args, kwargs = map_arg((node.args, node.kwargs), _held)
    try:
        return node.target(*args, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})})  # type: ignore[operator]
    except Exception:  # of values that nobody knows
        return None


def _hinted(value: Any) -> Any:
    """With the sizes of the call that was compiled: to ask a symbolic one would fix it."""
    if not isinstance(value, Tensor):
        return _number(value)
    shape = [_number(n) for n in (*value.shape, *value.stride())]
    rank = value.dim()
    return None if None in shape else torch.empty_strided(shape[:rank], shape[rank:], dtype=value.dtype, device="meta")  # type: ignore[arg-type]


def _number(n: Any) -> int | None:
    """A size, or what a symbolic one is in the call that was compiled."""
    return hint(n) if isinstance(n, SymInt) else n if isinstance(n, int) else None


def compile_for(call: ExpectedCall, wanted: tuple[bool, ...]) -> None:
    """With weights beside the result, and with gradients where any are ``wanted``. It costs nobody a call if that fails."""
    spec = parsed(call.spec)
    try:
        with torch.cuda.device(call.device) if call.device.type == "cuda" else nullcontext():
            kernel = targets.kernel(spec, call.target)
            if kernel.source is None:
                return
            if not any(wanted) and not call.weights:
                kernel(call.operands, call.sizes)
                return
            out, lse = kernel.forward(call.operands, call.sizes)
            for text, heads in call.weights:
                targets.weights_kernel(parsed(text), call.target)(call.operands, lse, call.sizes, heads)
            if any(wanted):
                targets.backward_kernel(spec, call.target, wanted)(out, call.operands, call.sizes, out, lse)
    except Exception:
        log.debug("compiling beforehand failed; the first call will tell why if it matters", exc_info=True)
