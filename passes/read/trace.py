"""Reading a slice of a Dynamo graph as functional ATen.

The slice's nodes are run once on fake tensors, each under its own autocast state, below autograd and with mutations made
functional; every ATen call is recorded as a Value. Nothing of this is executed later: it is for reading only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from fuse.ir.spec import IntLike
from fuse.passes.read.flex import flex_as_products, is_flex
from fuse.passes.read.graph import (  # fmt: skip
    LITERAL,
    PLAIN,
    Autocast,
    State,
    below_transforms,
    location,
    operator_name,
    storage_of,
    tensor_of,
    user_name,
    wants_gradient,
    writes,
)
from fuse.passes.read.sdpa import sdpa_as_products
from fuse.passes.read.varlen import by_name, is_varlen, varlen_as_products
from fuse.report.reasons import Declined, NotTraceable, Subclass
from fuse.torch_private import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    disable_current_modes,
    enable_python_dispatcher,
    hint,
    is_distributed,
    pytree,
    schema,
    storage_id,
    to_copy,
)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the trace: result ``output`` of an ATen call, or, with ``op`` None, an input or a literal.

    args, kwargs    the call's, with Values in the place of tensors
    meta            shape, strides, dtype and device, as a fake tensor
    literal         the number held by a literal of one element
    origin          the Dynamo node that was run when the call was made
    """

    op: OpOverload[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    meta: torch.Tensor
    output: int = 0
    literal: float | int | bool | None = None
    origin: Node | None = None

    @property
    def shape(self) -> torch.Size:
        return self.meta.shape

    @property
    def dtype(self) -> str:
        return str(self.meta.dtype).removeprefix("torch.")

    def inputs(self) -> list[Value]:
        return [x for x in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Value)]


class Seed(Value):
    """The seed of the random numbers that ``origin`` draws: one int64."""


@dataclass(frozen=True)
class Trace:
    """
    ran       the nodes that were run
    value_of  what each node holds when all have run; a root, what it held when it had run itself
    node_of   where to take a value
    flowing   values that want a gradient
    stops     values that want none though something they are made of does: detached, or made under no_grad
    """

    ran: frozenset[Node]
    value_of: Mapping[Node, Value]
    node_of: Mapping[Value, Node]
    flowing: frozenset[Value]
    stops: frozenset[Value]

    def flows(self, value: Value) -> bool:
        """Whether ``value`` wants a gradient, also if it was made from the trace's by ``computed``."""
        made = value.op is not None and value.origin is None
        return value in self.flowing or (made and any(map(self.flows, value.inputs())))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: dict[int, Value] = {}
        self.alive: list[torch.Tensor] = []  # ids are only unique among the living
        self.running: Node | None = None

    def put(self, tensor: torch.Tensor, value: Value) -> None:
        self.values[id(tensor)] = value
        self.alive.append(tensor)

    def value(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in self.values:
            self.put(x, Value(None, (), {}, x, literal=_literal(x)))
        return self.values[id(x)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [self.value(x) for x in pytree.tree_leaves(args)]
        result = func(*args, **kwargs)
        if func.namespace not in ("aten", "fuse") or schema(func).is_mutable:
            return result  # the write-back of a mutated input; metadata queries
        if func is to_copy and not isinstance(args[0], torch.Tensor):
            self.put(result, Value(None, (), {}, result, literal=_converted(args[0], result.dtype)))
            return result  # a number of the program, of which batching makes a tensor
        spec = pytree.tree_structure(args)
        values = pytree.tree_unflatten(read, spec)
        named = {k: self.value(v) for k, v in kwargs.items()}
        for i, x in enumerate(pytree.tree_leaves(result)):
            if isinstance(x, torch.Tensor) and id(x) not in self.values:
                self.put(x, Value(func, tuple(values), named, x, output=i, origin=self.running))
        return result


def trace(
    nodes: Sequence[Node], inputs: Sequence[Node], state_of: Mapping[Node, State], roots: Set[Node] = frozenset()
) -> Trace:
    """Runs ``nodes``, in order, from fresh fakes for ``inputs``. Raises Declined if that fails or contradicts Dynamo.

    roots  of nodes: what may be replaced by what it holds then, to which others write later all the same
    """
    _refuse_subclasses([*inputs, *nodes])
    written = {storage_of(n) for node in nodes for n in writes(node)} - {None}
    mode = _fake_mode([*inputs, *nodes])
    recorder = _Recorder()
    tensor_inputs = [n for n in inputs if isinstance(n.meta.get("example_value"), torch.Tensor)]
    held: dict[Node, torch.Tensor] = {}

    def run(*fakes: torch.Tensor) -> list[Any]:
        env: dict[Node, Any] = dict(zip(tensor_inputs, fakes, strict=True))
        env |= {n: _given(n) for n in inputs if n not in env}
        before: dict[Node, torch.Tensor] = {}
        for node in nodes:
            recorder.running = node
            with _autocast(state_of[node].autocast):
                ran = _run_node(node, env)
                env[node] = _sharing(node, ran, env) if storage_of(node) in written else ran
            if node in roots and storage_of(node) in written:
                before[node] = env[node].clone()
        return [x if isinstance(x := before.get(n, env[n]), torch.Tensor) else None for n in nodes]

    with mode, enable_python_dispatcher(), torch.no_grad():
        fakes = [_fresh(n.meta["example_value"]) for n in tensor_inputs]
        for node, fake in zip(tensor_inputs, fakes, strict=True):
            recorder.put(fake, Value(None, (), {}, fake, literal=node.meta.get(LITERAL)))
            held[node] = fake
        try:
            with recorder:
                results = torch.func.functionalize(run, remove="mutations")(*fakes)
        except Declined:
            raise
        except Exception as e:
            raise Declined(NotTraceable(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")) from e
    held |= {n: r for n, r in zip(nodes, results, strict=True) if r is not None}
    return _as_trace(frozenset(nodes), held, recorder, state_of)


def _refuse_subclasses(nodes: Sequence[Node]) -> None:
    for node in nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and type(value) not in PLAIN and not is_distributed(value):
            raise Declined(Subclass(f"{user_name(node)} is a {type(value).__name__}", location(node)))


def computed(inputs: Sequence[Value], compute: Callable[..., torch.Tensor]) -> Value:
    """What ``compute`` makes of the tensors of ``inputs`` (there is at least one), as further calls; nothing is run."""
    recorder = _Recorder()
    for value in inputs:
        recorder.put(value.meta, value)
    with _mode_of(inputs[0]), enable_python_dispatcher(), torch.no_grad(), recorder:
        result = compute(*(value.meta for value in inputs))
    return recorder.value(result)  # type: ignore[no-any-return]


def computed_again(value: Value, compute: Callable[..., torch.Tensor]) -> Value:
    """What ``compute`` makes of the arguments of the call that ``value`` is the result of."""
    leaves, structure = pytree.tree_flatten((value.args, dict(value.kwargs)))

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, Value) else x for x in leaves], structure)
        return compute(*args, **kwargs)

    return computed(value.inputs(), call)


def depends_on(value: Value, source: Value) -> bool:
    """Is ``value`` made of ``source``, or the same?"""
    seen: set[Value] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if v is source:
            return True
        if v not in seen:
            seen.add(v)
            stack.extend(v.inputs())
    return False


def as_size(n: sympy.Expr, near: Value) -> IntLike:
    """A size as the trace in which ``near`` was read has it: an int or a SymInt."""
    shapes = _mode_of(near).shape_env
    return int(n) if n.is_Integer or shapes is None else shapes.create_symintnode(n, hint=None)


def size_hint(n: sympy.Expr, near: Value) -> int:
    """A size in the call that is being compiled; 0 where that is only known after running the graph."""
    size = as_size(n, near)
    return size if isinstance(size, int) else hint(size) or 0


def _mode_of(value: Value) -> FakeTensorMode:
    assert isinstance(value.meta, FakeTensor)
    return value.meta.fake_mode


def _as_trace(
    ran: frozenset[Node], held: Mapping[Node, torch.Tensor], recorder: _Recorder, state_of: Mapping[Node, State]
) -> Trace:
    value_of: dict[Node, Value] = {}
    node_of: dict[Value, Node] = {}
    for node, tensor in held.items():
        value = recorder.value(tensor)
        expected = node.meta.get("example_value")
        if isinstance(expected, torch.Tensor) and (expected.dtype != tensor.dtype or expected.dim() != tensor.dim()):
            here, theirs = (f"{x.dtype} {tuple(x.shape)}" for x in (tensor, expected))
            detail = f"{user_name(node)} is {here}, Dynamo has {theirs}"
            raise Declined(NotTraceable(detail, location(node)))
        value_of[node] = value
        node_of.setdefault(value, node)
    wanting = {v for n, v in value_of.items() if v.op is None and n not in ran and wants_gradient(n.meta["example_value"])}
    return Trace(ran, value_of, node_of, *_gradients(wanting, recorder.values.values(), state_of))


def _gradients(
    flowing: set[Value], values: Iterable[Value], state_of: Mapping[Node, State]
) -> tuple[frozenset[Value], frozenset[Value]]:
    """The values, in the order in which they were made, that a gradient reaches, and those at which it ends."""
    stops: set[Value] = set()
    for v in values if flowing else ():
        if v.op is None or not v.meta.is_floating_point() or flowing.isdisjoint(v.inputs()):
            continue
        if v.op is torch.ops.aten.detach.default or (v.origin is not None and not state_of[v.origin].grad):
            stops.add(v)
        else:
            flowing.add(v)
    return frozenset(flowing), frozenset(v for v in stops if v.op is not None and not schema(v.op).name.endswith("_like"))


def _literal(x: torch.Tensor) -> float | int | bool | None:
    """The number in a real tensor of one element: torch.tensor(0.0) written in the model."""
    if isinstance(x, FakeTensor) or x.numel() != 1:
        return None
    with disable_current_modes():
        return x.item()


def _converted(x: float | int | bool, dtype: torch.dtype) -> float | int | bool:
    with disable_current_modes():
        return torch.tensor(x, dtype=dtype).item()


def _fake_mode(nodes: Sequence[Node]) -> FakeTensorMode:
    for node in nodes:
        tensor = tensor_of(node)
        value = None if tensor is None else below_transforms(tensor)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise Declined(NotTraceable("no fake tensors in the graph"))


def _fresh(example: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(example.size(), example.stride(), dtype=example.dtype, device=example.device)


def _given(node: Node) -> Any:
    """What an input is that is no tensor. Scalars are fixed for the slice; reading a symbolic float guards on its value."""
    if node.op == "get_attr":  # the body of a function that is an argument, as FlexAttention's score_mod
        return getattr(node.graph.owning_module, str(node.target))
    x = node.meta.get("example_value")
    return float(x) if isinstance(x, torch.SymFloat) else x


def _sharing(node: Node, result: Any, env: Mapping[Node, Any]) -> Any:
    """``result``, or the argument that it is: torch's functionalize takes some operators that may return it (type_as,
    atleast_2d, broadcast_tensors) for copies, so that what is written to one of both would not be seen in the other.
    Declines where it is another view of the argument's memory.
    """
    if not isinstance(result, torch.Tensor):
        return result
    several = [n for n in node.all_input_nodes if tensor_of(n) is None]  # it takes one of their results
    arguments = [*node.all_input_nodes, *(n for of in several for n in of.all_input_nodes)]
    same = [x for n in arguments if isinstance(x := env.get(n), torch.Tensor) and storage_of(n) == storage_of(node)]
    if not same or any(storage_id(x) == storage_id(result) for x in same):
        return result
    for x in same:
        if (x.dtype, x.size(), x.stride()) == (result.dtype, result.size(), result.stride()):
            return x
    raise Declined(NotTraceable(f"{operator_name(node)} returns memory of its argument", location(node)))


def _autocast(states: tuple[Autocast, ...]) -> Any:
    if not states:
        return nullcontext()
    stack = ExitStack()
    for s in states:
        stack.enter_context(torch.autocast(s.device, dtype=s.dtype, enabled=s.enabled, cache_enabled=False))
    return stack


def _run_node(node: Node, env: Mapping[Node, Any]) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
    if is_flex(node):
        return flex_as_products(*args, **kwargs)
    if is_varlen(node):
        return varlen_as_products(**by_name(node.target, args, kwargs))
    if operator_name(node) == "scaled_dot_product_attention":
        return sdpa_as_products(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target = node.target
    assert isinstance(target, Callable)  # type: ignore[arg-type]
    return target(*args, **kwargs)  # type: ignore[operator]
