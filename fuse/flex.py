"""Training of FlexAttention on CPUs, and the maximum of its rows: torch refuses them before a graph is handed over, since it
has no kernel there. fuse has.

Refusals are functions that Dynamo traces. While a graph is traced for fuse others stand for them; for other backends, and
outside of torch.compile, they are what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.attention import flex_attention

from fuse.passes.read.flex import is_flex
from fuse.passes.read.graph import location, tensor_of
from fuse.report.site import Site
from fuse.torch_private import compiler_of_trace, flex_options, flex_refusal

_OUTPUT_MAX, _KERNEL_OPTIONS = "OUTPUT_MAX", 6  # an option, and which argument of the operator options are


def _again(function: Any) -> Any:
    """The same under another identity, so that what Dynamo puts in its place can call it."""
    return FunctionType(function.__code__, function.__globals__, function.__name__)


_refuse, _options = _again(flex_refusal), _again(flex_options)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _traced_for_fuse() -> bool:
    """Whether Dynamo traces for our backend."""
    return getattr(compiler_of_trace(), "__module__", "") == "fuse.backend"


@torch.compiler.substitute_in_graph(flex_refusal, skip_signature_check=True)
def _refuse_for_others(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.device.type != "cpu" or not _traced_for_fuse():
        _refuse(query, key, value)


@torch.compiler.substitute_in_graph(flex_options, skip_signature_check=True)
def _options_of_call(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, kernel_options: Any, return_aux: Any = None
) -> Any:
    if return_aux is None or not return_aux.max_scores or query.device.type != "cpu" or not _traced_for_fuse():
        return _options(query, key, value, return_lse, kernel_options, return_aux)
    options = _options(query, key, value, return_lse, kernel_options, flex_attention.AuxRequest(lse=return_aux.lse))
    options[_OUTPUT_MAX] = True
    return options


def refuse_on_cpu(gm: GraphModule, sites: Sequence[Site]) -> None:
    """Raises NotImplementedError, as torch would have, where a call that it refuses is left to Inductor."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if is_flex(node) and (refused := _refused(node)):
                why = next((f" fuse left it, since {s.reason}." for s in sites if s.reason and s.where == location(node)), "")
                raise NotImplementedError(f"Inductor does not support {refused} on CPU.{why}")


def _refused(node: Node) -> str:
    """What of a call Inductor has no kernel for."""
    if any(map(_trains_on_cpu, node.args[:3])):
        return "the backward of FlexAttention"
    options: Any = node.args[_KERNEL_OPTIONS]
    query = tensor_of(node.args[0]) if isinstance(node.args[0], Node) else None
    on_cpu = query is not None and query.device.type == "cpu"
    return "the maximum of FlexAttention's rows" if on_cpu and options.get(_OUTPUT_MAX) else ""


def _trains_on_cpu(operand: Any) -> bool:
    tensor = tensor_of(operand) if isinstance(operand, Node) else None
    return tensor is not None and tensor.requires_grad and tensor.device.type == "cpu"
