"""Custom operators whose derivative reads data, which no compiler can trace: it is computed when it is needed.

What ``torch.library.register_autograd`` is given may be any Python. Where it asks a tensor for a number, AOTAutograd fails
and Dynamo breaks the graph, in every frame down to that call: the experts of transformers do so in float32, to learn how
many tokens each has. A function that returns attention weights, which its caller drops, is then a graph of its own, whose
weights are a result. ``hide`` makes such a call one node of the forward and one of the backward graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fuse.torch_private import OpOverload, OpOverloadPacket, below_autograd, custom_op, schema


def hide(gm: GraphModule) -> bool:
    """Puts ``fuse::opaque`` in the place of each such call in ``gm``; False where there are none."""
    found = [hide(body) for body in gm.children() if isinstance(body, GraphModule)]
    for node in list(gm.graph.nodes):
        called = _called(node)
        tensors = None if called is None else _tensors(node, called)
        if called is None or tensors is None or not _Context.suits(called.name(), len(tensors)):
            continue
        with gm.graph.inserting_before(node):
            results = gm.graph.call_function(torch.ops.fuse.opaque.default, (called.name(), tensors))
            single = len(schema(called).returns) == 1
            node.replace_all_uses_with(gm.graph.call_function(getitem, (results, 0)) if single else results)
        gm.graph.erase_node(node)
        found.append(True)
    gm.recompile()
    return any(found)


def _called(node: Node) -> OpOverload[..., Any] | None:
    """The operator, if it is one whose derivative was registered from Python and whose arguments and results are tensors."""
    target = node.target.default if isinstance(node.target, OpOverloadPacket) else node.target
    op = custom_op(target.name()) if isinstance(target, OpOverload) else None
    if op is None or op.backward is None:
        return None
    arguments, returns = schema(op.overload).arguments, schema(op.overload).returns
    plain = all(str(v.type) == "Tensor" for v in (*arguments, *returns)) and not any(a.kwarg_only for a in arguments)
    return op.overload if plain and returns else None


def _tensors(node: Node, called: OpOverload[..., Any]) -> list[Node] | None:
    names = [a.name for a in schema(called).arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    found = [given.get(name) for name in names]
    return [x for x in found if isinstance(x, Node)] if all(isinstance(x, Node) for x in found) else None


class _Context:
    """What a registered derivative sees of autograd: tensors that it keeps, and attributes that it sets."""

    def __init__(self, wanted: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(wanted)
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    @staticmethod
    def of(name: str, tensors: Sequence[Any], wanted: Sequence[bool]) -> _Context:
        """After the forward pass of an operator that does not need its results again."""
        ctx, op = _Context(wanted), custom_op(name)
        if op is not None and op.setup_context is not None:
            op.setup_context(ctx=ctx, inputs=tuple(tensors), output=None)
        return ctx

    @staticmethod
    def suits(name: str, count: int) -> bool:
        """Whether the derivative keeps arguments as they are, and nothing else."""
        tensors = [torch.empty(0, device="meta") for _ in range(count)]
        try:
            ctx = _Context.of(name, tensors, [True] * count)
        except Exception:  # it looks at what it is given
            return False
        kept = [*ctx.saved_tensors, *(x for key, x in vars(ctx).items() if key not in ("needs_input_grad", "saved_tensors"))]
        return all(any(x is t for t in tensors) for x in kept)


# ------------------------------------------------------------------------------------------------------------ the ops

_library: Any = torch.library.Library("fuse", "FRAGMENT")
for _schema in (
    "opaque(str name, Tensor[] tensors) -> Tensor[]",
    "opaque_backward(str name, Tensor[] tensors, Tensor[] grads, bool[] wanted) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _opaque(name: str, tensors: list[Tensor]) -> list[Tensor]:
    op = custom_op(name)
    assert op is not None  # see _called
    results = op.overload(*tensors)
    return [results] if isinstance(results, Tensor) else list(results)


def _opaque_backward(name: str, tensors: list[Tensor], grads: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    op = custom_op(name)
    assert op is not None and op.backward is not None  # see _called
    given = op.backward(_Context.of(name, tensors, wanted), *grads)
    found = given if isinstance(given, tuple) else (given,)
    kept = [(t, g) for t, g, w in zip(tensors, found, wanted, strict=True) if w]
    return [torch.zeros_like(t) if g is None else torch.empty_like(t).copy_(g) for t, g in kept]


def _fake_backward(name: str, tensors: list[Tensor], grads: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    return [torch.empty_like(t) for t, w in zip(tensors, wanted, strict=True) if w]


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        ctx.save_for_backward(*tensors)
        with below_autograd():
            return tuple(torch.ops.fuse.opaque.default(name, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[1:])
        found = iter(torch.ops.fuse.opaque_backward.default(ctx.name, ctx.saved_tensors, grads, wanted))
        return (None, *(next(found) if w else None for w in wanted))


def _autograd(name: str, tensors: list[Tensor]) -> list[Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return list(_Opaque.apply(name, *tensors))  # type: ignore[no-untyped-call]
    with below_autograd():
        return list(torch.ops.fuse.opaque.default(name, tensors))


for _name, _kernel, _fake in (("opaque", _opaque, _opaque), ("opaque_backward", _opaque_backward, _fake_backward)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fuse::{_name}", _fake, lib=_library)
_library.impl("opaque", _autograd, "Autograd")
