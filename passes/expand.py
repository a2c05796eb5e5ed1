"""Attention that PyTorch offers as one call, written out so that the other passes can see into it.

nn.MultiheadAttention and nn.TransformerEncoderLayer reach a backend as single nodes. Each is traced once, above autograd,
and its nodes are put behind it; where none of them is fused in the end, the call is kept and they are removed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from fuse.passes.read.graph import VALUE, operator_name, tensor_of
from fuse.passes.read.varlen import VARLEN, VARLEN_OUT, by_name, is_varlen
from fuse.passes.replace import remove
from fuse.torch_private import FakeTensor, make_fx, pytree, schema


@dataclass(frozen=True)
class Expansion:
    """A call, the nodes that do the same, those that take the place of its users' reads, and the call's arguments.

    Until it is decided which of the two stays, the call reads nothing: a softmax would keep its scores alive.
    """

    call: Node
    nodes: tuple[Node, ...]
    moved: tuple[tuple[Node, Node], ...]
    arguments: tuple[Any, Any]

    def undo(self, graph: Graph) -> None:
        self.call.args, self.call.kwargs = self.arguments
        for old, new in self.moved:
            new.replace_all_uses_with(old)
        remove(graph, self.nodes)


def expand(graph: Graph) -> list[Expansion]:
    """Writes out every composite call of a graph that can be."""
    expansions = []
    for node in list(graph.nodes):
        function = _written_out(node)
        if is_varlen(node, VARLEN_OUT):
            found = _expand_varlen_out(graph, node)
        else:
            found = _expand(graph, node, function) if function is not None else _expand_module(graph, node)
        if found is not None:
            expansions.append(found)
    return expansions


def _expand_module(graph: Graph, node: Node) -> Expansion | None:
    """A module that a traced graph calls as one, if it has a part in attention: a softmax, a dropout, all of it."""
    module = graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" and graph.owning_module else None
    if module is None or not any(part in type(m).__name__.lower() for m in module.modules() for part in _PARTS):
        return None
    mode = next((x.fake_mode for n in node.all_input_nodes if isinstance(x := tensor_of(n), FakeTensor)), None)
    if mode is None:
        return None
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    with graph.inserting_before(node):
        reads = [graph.get_attr(f"{node.target}.{name}") for name in held]
    for read, tensor in zip(reads, held.values(), strict=True):
        read.meta[VALUE] = mode.from_tensor(tensor, static_shapes=True)

    def function(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(module, dict(zip(held, tensors, strict=True)), args, kwargs)

    called, node.args = node.args, (reads, *node.args)
    found = _expand(graph, node, function)
    if found is None:
        node.args = called
        remove(graph, reads)
        return None
    return replace(found, nodes=(*reads, *found.nodes), arguments=(called, found.arguments[1]))


def _expand_varlen_out(graph: Graph, node: Node) -> Expansion | None:
    """A call that writes its result into a tensor that it is given: the call that returns it, and a copy."""

    def function(out: Tensor, **given: Any) -> Tensor:
        result, lse, _ = getattr(torch.ops.torch_attn, VARLEN)(**given)
        out.copy_(result)
        return lse  # type: ignore[no-any-return]

    called = node.args, node.kwargs
    lengths = {"max_q": 0, "max_k": 0}  # only how much memory is taken depends on them, and they would be fixed
    node.args, node.kwargs = (), by_name(node.target, *called) | lengths
    found = _expand(graph, node, function)
    if found is None:
        node.args, node.kwargs = called
        return None
    return replace(found, arguments=called)


def _written_out(node: Node) -> Callable[..., Any] | None:
    if node.op != "call_function":
        return None
    called = schema(node.target)
    if called is not None and _SDPA in called.name and "backward" not in called.name:
        return partial(kernel_of_sdpa, tuple(a.name for a in called.arguments))
    return COMPOSITES.get(operator_name(node))


def _expand(graph: Graph, node: Node, function: Callable[..., Any]) -> Expansion | None:
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    inputs = [x for x in leaves if isinstance(x, Node)]
    values = [_value(x) for x in inputs]
    if any(x is None for x in values):
        return None

    def call(*values: Any) -> list[Any]:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = pytree.tree_unflatten([given[x] if isinstance(x, Node) else x for x in leaves], structure)
        result = function(*args, **kwargs)
        return list(result) if isinstance(result, (tuple, list)) else [result]

    try:
        traced = make_fx(call, tracing_mode="symbolic", pre_dispatch=True)(*values)
    except Exception:  # what cannot be traced stays one call
        return None
    results: Any = traced.graph.output_node().args[0]
    if any(results[i] is None for i in _read(node)):
        return None
    return _splice(graph, node, traced.graph, inputs)


def _read(node: Node) -> list[int]:
    """Which of the results of a call that has several are read."""
    if tensor_of(node) is not None:
        return [0]
    items: list[Any] = [user.args[1] for user in node.users if operator_name(user) == "getitem" and user.users]
    return items


def _value(node: Node) -> Any:
    """What a node holds while tracing; widths and dropout rates that are symbols are fixed, with a guard."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return int(value)
    return float(value) if isinstance(value, torch.SymFloat) else tensor_of(node)


def _splice(graph: Graph, node: Node, body: Graph, inputs: list[Node]) -> Expansion:
    env = dict(zip((n for n in body.nodes if n.op == "placeholder"), inputs, strict=True))
    flowing = any(x.requires_grad for x in pytree.tree_leaves(node.meta.get("example_value")) if isinstance(x, Tensor))
    made: list[Node] = []
    _drop_unread(node, body)
    following = node.next
    with graph.inserting_before(following):
        for n in body.nodes:
            if n.op != "call_function":
                continue
            copy = graph.node_copy(n, lambda x: env[x])
            if copy.target is torch.ops.aten.view.default:  # relies on strides that what is fused need not have: in torch 2.11
                copy.target = torch.ops.aten.reshape.default
            copy.meta = {k: v for k, v in node.meta.items() if k != "example_value"} | {"example_value": n.meta.get("val")}
            if flowing:
                _inherit_gradient(copy)
            env[n] = copy
            made.append(copy)
    moved = tuple(_redirect(node, body.output_node().args[0], env))
    arguments, node.args, node.kwargs = (node.args, node.kwargs), (), {}
    return Expansion(node, tuple(made), moved, arguments)


def _inherit_gradient(node: Node) -> None:
    """Tracing keeps values detached."""
    value = tensor_of(node)
    if value is not None and value.is_floating_point():
        sources = (tensor_of(x) for x in node.all_input_nodes)
        value.requires_grad_(any(x is not None and x.requires_grad for x in sources))


def _drop_unread(node: Node, body: Graph) -> None:
    """Averaged attention weights, which nn.MultiheadAttention makes unless told not to, would keep the probabilities alive."""
    if tensor_of(node) is None:
        read, output = _read(node), body.output_node()
        output.args = ([x if i in read else None for i, x in enumerate(output.args[0])],)  # type: ignore[arg-type]
        body.eliminate_dead_code()


def _redirect(node: Node, results: Any, env: dict[Node, Node]) -> list[tuple[Node, Node]]:
    """Points the users of the call, or of its items, to the written-out results."""
    if tensor_of(node) is not None:
        pairs = [(node, results[0])]
    else:
        pairs = [(user, results[user.args[1]]) for user in node.users if operator_name(user) == "getitem"]
    moved = []
    for old, new in pairs:
        if isinstance(new, Node):
            old.replace_all_uses_with(env[new])
            moved.append((old, env[new]))
    return moved


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """torch._transformer_encoder_layer_fwd, src (B, S, E) → (B, S, E): nn.TransformerEncoderLayer.forward in evaluation."""

    def attend(x: Tensor) -> Tensor:
        return native_attention(x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True,
                                mask_type)[0]  # fmt: skip

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def native_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """torch._native_multi_head_attention on dense (B, S, E) inputs, without weights returned.

    mask_type 0 is a mask (L, L) of scores, 1 one of keys (B, L), 2 one of (B, heads, L, L); true means masked.
    """
    if need_weights or query.is_nested:
        raise NotImplementedError
    batch, length, _ = query.shape
    weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).view(batch, x.shape[1], num_head, -1).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    score = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        if mask_type == 1:
            mask = mask[:, None, None, :]
        score = score.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else score + mask
    out = torch.softmax(score, -1) @ v
    return F.linear(out.transpose(1, 2).reshape(batch, length, embed_dim), proj_weight, proj_bias), None


def kernel_of_sdpa(names: tuple[str, ...], *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """One of ATen's _scaled_dot_product_* kernels, whose parameters have these ``names``: its result, and nothing else of it.

    That is what decomposed programs hold; (B, H, L, E), (B, H, S, E), (B, H, S, Ev) → (B, H, L, Ev).
    """
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("dropout_mask") is not None:
        raise NotImplementedError
    mask = given.get("attn_mask", given.get("attn_bias"))
    known = {name: given[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa") if name in given}
    out = F.scaled_dot_product_attention(given["query"], given["key"], given["value"], mask, **known)
    return (out, *[None] * 8)


_PARTS = ("softm", "dropout", "attention", "transformer")  # of the names of modules
_SDPA = "::_scaled_dot_product_"
COMPOSITES: dict[str, Callable[..., Any]] = {
    "multi_head_attention_forward": F.multi_head_attention_forward,
    "_transformer_encoder_layer_fwd": encoder_layer,
    "_native_multi_head_attention": native_attention,
}
