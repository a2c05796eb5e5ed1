"""Training of FlexAttention on CPUs: torch refuses it before a graph is handed over, since it has no kernel there. fuse has.

The refusal is a function that Dynamo traces. While a graph is traced for fuse another one stands for it; for other backends,
and outside of torch.compile, it is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule, Node
from torch.nn.attention import flex_attention

from fuse.passes.read.flex import is_flex
from fuse.passes.read.graph import location, tensor_of
from fuse.report.site import Site


def _accept(query: Tensor, key: Tensor, value: Tensor) -> None:
    """In the place of the refusal in a torch that has none."""


_REFUSAL: Any = getattr(flex_attention, "_validate_device", _accept)
# The same under another identity, so that what Dynamo puts in its place can call it
_refuse: Any = FunctionType(_REFUSAL.__code__, _REFUSAL.__globals__, _REFUSAL.__name__)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _traced_for_fuse() -> bool:
    """Whether Dynamo traces for our backend."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while inner := getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None):
        backend = inner
    return getattr(backend, "__module__", "") == "fuse.backend"


@torch.compiler.substitute_in_graph(_REFUSAL, skip_signature_check=True)
def _refuse_for_others(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.device.type != "cpu" or not _traced_for_fuse():
        _refuse(query, key, value)


def refuse_training(gm: GraphModule, sites: Sequence[Site]) -> None:
    """Raises NotImplementedError, as torch would have, where a call that wants gradients on a CPU is left to Inductor."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if is_flex(node) and any(map(_trains_on_cpu, node.args[:3])):
                why = next((f" fuse left it, since {s.reason}." for s in sites if s.reason and s.where == location(node)), "")
                raise NotImplementedError(f"Inductor does not support the backward of FlexAttention on CPU.{why}")


def _trains_on_cpu(operand: Any) -> bool:
    tensor = tensor_of(operand) if isinstance(operand, Node) else None
    return tensor is not None and tensor.requires_grad and tensor.device.type == "cpu"
