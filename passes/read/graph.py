"""Facts about the nodes of a Dynamo graph: what they call, under which state, from which line, writing what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from fuse.report.site import Frame
from fuse.torch_private import (
    FakeTensor,
    OpOverload,
    hint,
    is_batched,
    is_distributed,
    is_wrapped,
    level_of,
    local_part,
    schema,
    source_name,
    storage_id,
    unwrapped,
)

# Functions whose bare name would hide that they are in place, or that look in place and are not.
_PURE_DUNDERS = {"and_", "or_", "xor_", "not_", "is_", "truth"}
_OPERATOR_WRITES = {
    "setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
}  # fmt: skip
# What Dynamo calls x.T, x.H, x.mT and x.mH; it is an operator in torch 2.15
ATTRIBUTES = {"getattr", "numpy_T", "matrix_H", "mT", "mH"}
# What hands on the numbers of a tensor in another shape, under the names of Dynamo's graph and of ATen.
VIEWS = {
    "view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "getitem", "contiguous", "clone",
    "flatten", "unflatten", "split", "chunk", "unbind", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "narrow",
    "select", "repeat_interleave", "repeat", "expand_as", "view_as", "reshape_as", "detach", "tile",
    "broadcast_to", "split_with_sizes", "tensor_split", "alias", "slice", "_unsafe_view", "lift_fresh_copy", *ATTRIBUTES,
}  # fmt: skip
VALUE = "example_value"  # what a node holds, as a fake tensor
LITERAL = "literal of fuse"  # the number in a tensor of one element that no call changes
NAME = "name in the model"  # of a tensor that a graph has as an input
# Other subclasses (DTensor, nested tensors, a user's own) have a say in what each op does, so that no reading is a proof.
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
MADE = "made by fuse"  # marks nodes that are no part of the user's program
Calls = tuple[tuple[OpOverload, tuple[Any, ...]], ...]
_ENTERS = "_increment_nesting"
_TORCH = str(Path(torch.__file__).parent)
# Of Dynamo's names for where a tensor or a module comes from: scopes, torch's own "self" and "fn", and what holds others.
_NO_NAMES = ("L", "G", "_parameters", "_buffers", "_modules", "__closure__", "cell_contents")
_NO_MODULES = re.compile(
    r"^[LG]\['(?:self|fn)'\]\.?|^[LG](?=\[)|_modules\['?([^'\]]+)'?\]|\._modules|\.__closure__\[\d+\]\.cell_contents"
)
_OF_MODULE = re.compile(r"\b_(?:parameters|buffers|modules)\b")
_FRAME = re.compile(r'File "(.*)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class Autocast:
    device: str
    dtype: torch.dtype
    enabled: bool


@dataclass(frozen=True)
class Transform:
    """One of torch.func around nodes of the graph: "vmap", "grad" (vjp and jacrev as well), "jvp", entered at ``by``.

    examples  how many a vmap has in the call that is compiled; 0 of others
    """

    name: str
    by: Node
    examples: int


@dataclass(frozen=True)
class State:
    """What surrounds a node: grad mode, transforms from the outermost one, autocast contexts entered in the graph."""

    grad: bool
    transforms: tuple[Transform, ...]
    autocast: tuple[Autocast, ...]


def operator_name(node: Node) -> str:
    """The bare name of what a node calls: "matmul" for torch.matmul, Tensor.matmul and operator.matmul alike."""
    target = node.target
    if isinstance(target, str):
        return target.rsplit(".", 1)[-1]
    if isinstance(target, OpOverload):
        return str(schema(target).name).split("::")[-1]
    return str(getattr(target, "__name__", target))


def tensor_of(node: Node) -> torch.Tensor | None:
    value = node.meta.get(VALUE)
    return value if isinstance(value, torch.Tensor) else None


def hidden_subclass(graph: Graph, inputs: Sequence[Any]) -> str:
    """ "x is a Tagged" where ``inputs``, the graph's, hold a subclass that Dynamo's graph shows as a plain tensor, or ""."""
    for node, x in zip(graph.find_nodes(op="placeholder"), inputs, strict=False):
        if isinstance(x, torch.Tensor) and type(x) not in PLAIN and type(tensor_of(node)) in PLAIN:
            return f"{user_name(node)} is a {type(x).__name__}"
    return ""


def ambient() -> State:
    """The state of whoever asks."""
    autocast = (_ambient_autocast(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device))
    return State(torch.is_grad_enabled(), (), tuple(autocast))


def states(graph: Graph, begins: State) -> dict[Node, State]:
    """The state under which each node runs, by one scan in order; ``begins``: the state of the graph's caller."""
    grad, transforms = begins.grad, begins.transforms
    entered: dict[Node, Autocast] = {}
    found: dict[Node, State] = {}
    for node in graph.nodes:
        name = operator_name(node) if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            grad = bool(node.args[0])
        elif name == "_enter_autocast":
            device, dtype, enabled, _ = (*node.args, None, None, None, None)[:4]
            entered[node] = Autocast(str(device), autocast_dtype(device, dtype), bool(enabled))
        elif name == "_exit_autocast":
            entered.pop(node.args[0], None)
        elif name.endswith(_ENTERS):
            transforms += (_transform(node),)
        elif name.endswith("_decrement_nesting"):
            transforms = transforms[:-1]
        found[node] = State(grad, transforms, (*begins.autocast, *entered.values()))
    return found


def _transform(node: Node) -> Transform:
    kind = operator_name(node).removesuffix(_ENTERS).strip("_")
    given: Any = node.args[0] if kind == "vmap" else 0
    size = given.meta["example_value"] if isinstance(given, Node) else given
    return Transform(kind, node, size if isinstance(size, int) else hint(size) or 0)


def below_transforms(x: torch.Tensor) -> torch.Tensor:
    """The tensor that the levels of torch.func wrap; of a DTensor, what this rank has."""
    while is_wrapped(x):
        x = unwrapped(x)
    return local_part(x) if is_distributed(x) else x


def counts_examples(node: Node, transform: Transform, transforms: Sequence[Transform]) -> bool:
    """Whether ``node`` holds a value for each example of a vmap, one of the ``transforms`` around it."""
    x = tensor_of(node)
    if x is None:  # made by a pass, at the same place
        return any(counts_examples(n, transform, transforms) for n in node.all_input_nodes)
    level = 1 + list(transforms).index(transform)
    while is_wrapped(x):
        if is_batched(x) and level_of(x) == level:
            return True
        x = unwrapped(x)
    return False


def wants_gradient(x: torch.Tensor) -> bool:
    """At whatever level: a tensor tells of its own only."""
    while not x.requires_grad and is_wrapped(x):
        x = unwrapped(x)
    return x.requires_grad


def _ambient_autocast(device: str) -> Autocast:
    return Autocast(device, torch.get_autocast_dtype(device), True)


def autocast_dtype(device: Any, dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(device))


def is_torchs(node: Node) -> bool:
    """Whether it calls a method or a function that is Python's, torch's or ATen's: no operator that somebody else made."""
    module = str(getattr(node.target, "__module__", ""))
    torchs = module.startswith("torch") and ("ops." not in module or module == "torch._ops.aten")
    return node.op == "call_method" or (node.op == "call_function" and (module == "_operator" or torchs))


def writes(node: Node) -> tuple[Node, ...]:
    """The nodes whose storage ``node`` writes."""
    if node.op not in ("call_function", "call_method"):
        return ()
    name = operator_name(node)
    nodes = [a for a in node.args if isinstance(a, Node)]
    out = node.kwargs.get("out")
    written = [out] if isinstance(out, Node) else []
    called = schema(node.target)
    if called is not None:
        args = [a for a, s in zip(node.args, called.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
        return tuple(a for a in args if isinstance(a, Node))
    method = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    function = node.op == "call_function" and (
        name in _OPERATOR_WRITES or (name.endswith("_") and name not in _PURE_DUNDERS and not name.startswith("_"))
    )
    if nodes and (method or function or node.kwargs.get("inplace") is True):
        written.append(nodes[0])
    return tuple(written)


def storage_of(node: Node) -> int | None:
    """Nodes with the same number share memory."""
    tensor = tensor_of(node)
    if tensor is None:
        return None
    try:
        return storage_id(below_transforms(tensor))
    except (NotImplementedError, RuntimeError):
        return None


def is_state(node: Node) -> bool:
    """Is this a buffer, a parameter or a global variable, which the graph does not write?"""
    storage = storage_of(node)
    written = {storage_of(w) for n in node.graph.nodes for w in writes(n)}
    held = is_of_module(node) or source_name(node).startswith("G[")
    return held and storage is not None and storage not in written


def is_of_module(node: Node) -> bool:
    """Is this an input that Dynamo has found in a module?"""
    return _OF_MODULE.search(source_name(node)) is not None


def reached_from(*nodes: Node | None) -> set[Node]:
    """``nodes`` and all that depends on one of them."""
    seen: set[Node] = set()
    stack = [n for n in nodes if n is not None]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack.extend(n.users)
    return seen


def frames(node: Node) -> tuple[Frame, ...]:
    """The user's frames that ran the node, outermost first, as far as the tracer kept them: frames inside torch are the user's
    call, and stand here where there are no others.
    """
    found = [f for f in _FRAME.findall(node.meta.get("stack_trace") or node.stack_trace or "") if not f[0].startswith("<")]
    found = [f for f in found if not f[0].startswith(_TORCH)] or found
    return tuple(Frame(file, int(line), function) for file, line, function in found)


def location(node: Node) -> str:
    """ "file.py:line" of the innermost user frame. Where the tracer kept none, as for a module of torch that was compiled
    itself, the name of the module's class, or the node's own.
    """
    if found := frames(node):
        return str(found[-1])
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    kind = list(stack.values())[-1][1] if stack else None
    return str(getattr(kind, "__name__", kind or f"%{node.name}"))


def user_name(node: Node) -> str:
    """What the user's code calls the tensor, or what it was made of: "attention_mask" for L['kwargs']['attention_mask']."""
    made = [node]
    while made:
        node = made.pop()
        if not (MADE in node.meta or operator_name(node) in {"snapshot", *ATTRIBUTES}):
            break
        made += reversed([n for n in node.all_input_nodes if not isinstance(n.meta.get(VALUE), torch.SymInt)])
        if operator_name(node) in ("bmm", "mm"):
            left, right = map(user_name, node.all_input_nodes)
            return f"({left} @ {right})"
    if MADE in node.meta:
        return "table"
    path = str(node.meta.get(NAME) or source_name(node))
    words = re.findall(r"\w+", path)
    named = [w for w in words if not w.isdigit() and w not in _NO_NAMES]
    if named:
        return ".".join(named[-2:] if named[-1] in ("weight", "bias") else named[-1:])
    return node.name if node.op == "placeholder" else re.sub(r"_\d+$", "", node.name)  # a variable's, or the operator's


def module_path(node: Node) -> str:
    """Path of the innermost module that ran the node: "model.layers.0.self_attn", or ""."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = _NO_MODULES.sub(lambda m: m.group(1) or "", path)
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).strip(".").replace("..", ".")
