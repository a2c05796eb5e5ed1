"""What torch has and does not promise to keep: no other module names it. Each with what fuse needs it to do.

tests/test_torch_private.py has a test under each name, so that with another torch the tests that fail tell what has changed.
What differs between versions is settled here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from logging import Logger
from operator import attrgetter
from typing import Any

import torch
from torch import SymInt, Tensor, nn

# From an overload of ATen to a function of tensors that computes it in simpler ones
from torch._decomp import decomposition_table

# A context in which operators below autograd reach what Python has registered for them, as make_fx enters it
from torch._dispatch.python import enable_python_dispatcher

# Settings of Dynamo, with patch(); a backend by its name
from torch._dynamo import config as dynamo_config

# Has graphs hold a dimension of a tensor as a symbol, unless the model fixes it: (tensor, dimension)
from torch._dynamo import lookup_backend, maybe_mark_dynamic
from torch._dynamo.symbolic_convert import InstructionTranslator

# What a batching rule is given first, with batch_size
from torch._functorch.autograd_function import VmapInfo

# A context in which autograd functions of a single level may be called while transforms of torch.func are active
from torch._functorch.utils import enable_single_level_autograd_function

# The fake mode of the fake tensors among some values; None where there are none
from torch._guards import TracingContext, detect_fake_mode

# FlexAttention's operator in plain ATen: (query, key, value, score_mod, block mask, scale, options, buffers, buffers)
from torch._higher_order_ops.flex_attention import math_attention

# Settings of Inductor by name, with patch() and get_config_copy()
from torch._inductor import config as inductor_config

# A base of passes whose uuid() is part of the keys of torch's caches; a digest of files
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._library.custom_ops import OPDEFS
from torch._logging import _internal as _logging

# What a node of a graph calls: an operator with bodies; an operator with namespace, name(), tags and overloadpacket; all
# overloads of one name, the first of them as default
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

# What an inner compiler raises that would have to know what a tensor holds; tensors without memory, with fake_mode, of a mode
# with from_tensor() and shape_env
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import forward_ad

# An autograd function that is differentiated at one level of torch.func, as an operator of ATen is
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.fx import Node
from torch.fx.experimental import symbolic_shapes

# A function and example inputs → its graph in ATen
from torch.fx.experimental.proxy_tensor import make_fx

# The symbolic sizes of a program: create_symintnode(), ignore_fresh_unbacked_symbols(), and guards as text, written by
# produce_guards_expression() and read by evaluate_guards_expression(). What keeps the symbols of sizes that data decides in
# another run: (shapes, node, its value)
from torch.fx.experimental.symbolic_shapes import ShapeEnv, rebind_unbacked
from torch.nn.attention import flex_attention

# The size of blocks in the BlockMask of a call without a mask
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE as LARGE_SPARSE_BLOCK_SIZE

# Nested lists, tuples and dictionaries as leaves and structure
from torch.utils import _pytree as pytree

# A context that sees each operator as it is called; one in which no such context is entered
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

# Quotients and remainders of sizes in sympy: exact, floored, of what is not negative, and with the divisor's sign
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, PythonMod

__all__ = [
    "LARGE_SPARSE_BLOCK_SIZE",
    "CleanDiv",
    "CustomGraphPass",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "HigherOrderOperator",
    "Impure",
    "Inductor",
    "Mod",
    "OpOverload",
    "OpOverloadPacket",
    "PythonMod",
    "ShapeEnv",
    "SingleLevelFunction",
    "SizeWouldBeFixed",
    "TorchDispatchMode",
    "VmapInfo",
    "add_batch_dim",
    "any_tangent",
    "artifact_logger",
    "artifact_manager",
    "below_autograd",
    "compiler_of_trace",
    "custom_op",
    "decomposition_table",
    "default_store",
    "detect_fake_mode",
    "disable_current_modes",
    "dynamo_config",
    "enable_python_dispatcher",
    "enable_single_level_autograd_function",
    "flex_options",
    "flex_refusal",
    "get_hash_for_files",
    "given_for",
    "group_named",
    "guard_input",
    "hint",
    "inductor_config",
    "is_batched",
    "is_distributed",
    "is_legacy_batched",
    "is_traced",
    "is_wrapped",
    "legacy_vmap_level",
    "level_of",
    "local_part",
    "lookup_backend",
    "make_fx",
    "math_attention",
    "maybe_mark_dynamic",
    "open_sizes",
    "original",
    "packet_name",
    "pytree",
    "rebind_unbacked",
    "remove_batch_dim",
    "safe_softmax",
    "saves_by_hooks",
    "schema",
    "source_name",
    "storage_id",
    "tensor_id",
    "to_copy",
    "trace_artifact",
    "transforms_active",
    "unwrapped",
    "version",
    "without_vmap_loops",
    "write_calls",
]

# ------------------------------------------------------------------------------------------------------------ operators

safe_softmax = torch.ops.aten._safe_softmax.default
"""(scores, dim) → softmax, 0 where every score of a row is -inf."""

to_copy = torch.ops.aten._to_copy.default
"""What a conversion to another dtype is in a trace."""


def schema(target: Any) -> Any:
    """name, arguments and returns of an operator, and whether it is_mutable; None for what is none."""
    return getattr(target, "_schema", None)


def packet_name(packet: OpOverloadPacket[..., Any]) -> str:
    """ "aten::add"."""
    return packet._qualified_op_name


@dataclass(frozen=True)
class CustomOp:
    """An operator of ``torch.library.custom_op``, with what ``register_autograd`` was given."""

    overload: OpOverload[..., Any]
    backward: Callable[..., Any] | None
    setup_context: Callable[..., Any] | None


def custom_op(name: str) -> CustomOp | None:
    """The operator that was defined as ``name``, if one was."""
    found = OPDEFS.get(name)
    return None if found is None else CustomOp(found._opoverload, found._backward_fn, found._setup_context_fn)


# ------------------------------------------------------------------------------------------------------------- autograd

below_autograd: Callable[[], AbstractContextManager[None]] = torch._C._AutoDispatchBelowAutograd
"""A context in which operators go to what is below their autograd kernels, at the present level of torch.func."""

version: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor's memory has been written."""


def any_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether forward mode differentiates by one of them."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def saves_by_hooks() -> bool:
    """Whether somebody is handed what autograd saves, as activation checkpointing is."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


# ------------------------------------------------------------------------------------------------- levels of torch.func

_functorch: Any = torch._C._functorch

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of torch.func is running."""

is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether a tensor is one level's view of another."""

unwrapped: Callable[[Tensor], Tensor] = _functorch.get_unwrapped
"""The tensor one level further out."""

is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor
"""Whether that level is a vmap that counts its examples in this tensor."""

level_of: Callable[[Tensor], int] = _functorch.maybe_get_level
"""The number of that level, the outermost being 1."""

is_legacy_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
"""Whether the vmap of ``torch.autograd.grad(is_grads_batched=True)`` counts its examples in this tensor."""

add_batch_dim: Callable[[Tensor, int, int], Tensor] = torch._add_batch_dim
"""(tensor, dimension of the examples, level) → the tensor that a vmap shows to its function."""

remove_batch_dim: Callable[[Tensor, int, int, int], Tensor] = torch._remove_batch_dim
"""(tensor, level, examples, dimension) → the same with its examples in a dimension, of how many there are if it has any."""


def legacy_vmap_level() -> int:
    """The number of the innermost vmap of ``is_grads_batched``."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


@contextmanager
def without_vmap_loops() -> Iterator[None]:
    """An operator without a batching rule raises, where vmap would call it once for every example."""
    loops = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(loops)


# -------------------------------------------------------------------------------------------------- tensors and sizes


tensor_id: Callable[[Tensor], int] = attrgetter("_cdata")
"""The address of what a tensor is in C++, which a Python object of it begins with."""


def storage_id(x: Tensor) -> int:
    """The same for tensors, fake ones too, that share memory."""
    return int(x.untyped_storage()._cdata)


def is_distributed(x: object) -> bool:
    """Whether something is a DTensor; without an import of what nobody else uses."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(x) is module.DTensor


local_part: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")
"""What this rank has of a DTensor."""


def hint(n: SymInt) -> int | None:
    """A symbolic size in the call that is being compiled; None where only a run tells."""
    found = n.node.hint
    return int(found) if isinstance(found, int) else None


SizeWouldBeFixed: Any = getattr(symbolic_shapes, "_ShapeEnvGuardError", ())
"""What ``open_sizes`` has torch raise; nothing where it cannot."""


def open_sizes(mode: FakeTensorMode) -> AbstractContextManager[None] | None:
    """A context in which whatever would fix a size raises; None where torch cannot: 2.11."""
    if mode.shape_env is None:
        return nullcontext()
    errors: Any = getattr(mode.shape_env, "error_on_new_guards", None)
    return None if errors is None else errors()


# ------------------------------------------------------------------------------------------------- graphs and compilers


class Impure(nn.Module):
    """A module whose call no graph removes, although nobody reads what it gives."""

    _is_impure = True


Inductor: Callable[..., Callable[..., Any]] = torch._TorchCompileInductorWrapper
"""(mode, options, dynamic) → what torch.compile hands a graph and its example inputs to."""


@dataclass(frozen=True)
class WrittenCall:
    """How code that Inductor writes calls an operator: ``name(the arguments but those that are fixed)``.

    definition  lines of Python that define ``name``; they stand once among the imports of the code
    fixed       names of arguments that the definition holds
    """

    name: str
    definition: tuple[str, ...]
    fixed: frozenset[str]


def write_calls(op: OpOverload[..., Any], written: Callable[[dict[str, Any]], WrittenCall]) -> None:
    """From now on Inductor writes calls of ``op`` as ``written`` has it for their arguments, by name.

    For Python only: where Inductor writes C++, calls are what they were. Operands keep the strides that they have in the graph.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    class Call(ir.FallbackKernel):
        def _written(self) -> WrittenCall:
            args, kwargs = self.unflatten_args(self.inputs, self.constant_args)
            return written(dict(zip((a.name for a in schema(op).arguments), args, strict=False)) | kwargs)

        def codegen(self, wrapper: Any) -> None:
            if not V.graph.cpp_wrapper:
                while (parent := getattr(wrapper, "parent_wrapper", None)) is not None:  # of graphs inside the graph
                    wrapper = parent
                for line in self._written().definition:
                    wrapper.add_import_once(line)
            super().codegen(V.graph.wrapper_code)

        def get_kernel_name(self) -> str:
            return super().get_kernel_name() if V.graph.cpp_wrapper else self._written().name

        def codegen_args(self) -> list[str]:
            args: list[str] = super().codegen_args()
            if V.graph.cpp_wrapper:
                return args
            fixed = self._written().fixed
            return [text for text, a in zip(args, schema(op).arguments, strict=False) if a.name not in fixed]

    def lower(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map_only(ir.IRNode, ir.TensorBox.create, Call.create(op, *args, **kwargs))

    lowering.make_fallback(op, layout_constraint=lowering.constrain_to_fx_strides, warn=False)
    lower._is_fallback_handler = True  # type: ignore[attr-defined]
    lowering.register_lowering(op, type_promotion_kind=None)(lower)


def source_name(node: Node) -> str:
    """Where a placeholder of Dynamo's comes from, such as "L['self']._modules['proj']._parameters['weight']"; or ""."""
    return str(getattr(getattr(node, "_dynamo_source", None), "name", "") or "")


def given_for(node: Node) -> Any:
    """What Dynamo was called with for a placeholder, which may be of a subclass that its value does not show; or None."""
    return getattr(node.meta.get("grapharg"), "example", None)


def guard_input(node: Node, check: Callable[[Any], bool], always: Callable[[], bool], said: str) -> bool:
    """Has Dynamo, which is compiling, take what it compiles for those calls only in which ``check`` holds for ``node``, one of
    the graph's inputs, and ``always`` does. False where no Dynamo compiles, or it does not know the input.

    ``check`` is not asked about tensors of a module of which Dynamo sees that no attribute was replaced, if it is set to look
    no further (``use_recursive_dict_tags_for_guards``, which torch 2.11 is); ``always`` is. ``said``: in its log of guards.
    """
    source, context = getattr(node.meta.get("grapharg"), "source", None), TracingContext.try_get()
    if source is None or context is None or getattr(dynamo_config, "caching_precompile", False):  # guards are then saved
        return False

    def content_match(builder: Any, guard: Any) -> None:
        root, of_input = builder.guard_manager.root, builder.get_guard_manager(guard)
        for manager, asked in ((root, lambda _: always()), (of_input, check)):
            add = manager.add_lambda_guard
            add(asked, [said], *((guard.user_stack,) if "arg2" in str(add.__doc__) else ()))

    context.guards_context.dynamo_guards.add(source.make_guard(content_match))
    return True


def compiler_of_trace() -> Any:
    """The backend that Dynamo is tracing for, without what torch has wrapped it in."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while inner := getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None):
        backend = inner
    return backend


def original(model: Callable[..., Any]) -> Callable[..., Any]:
    """A module as it was before ``torch.compile(module)``; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def _accept(query: Tensor, key: Tensor, value: Tensor) -> None:
    """In the place of the refusal in a torch that has none."""


flex_refusal: Any = getattr(flex_attention, "_validate_device", _accept)
"""(query, key, value): what refuses gradients on a CPU. Dynamo traces it, and it is a function with code."""

flex_options: Any = flex_attention._apply_kernel_options
"""(query, key, value, whether the log-sum-exp is wanted, options, other results wanted) → the options of the operator, with
OUTPUT_MAX. Dynamo traces it, and it is a function with code; it refuses the maximum on a CPU.
"""


# ------------------------------------------------------------------------------------------------------- logs and traces


def artifact_logger(module: str, name: str) -> Logger:
    """The log of the artifact ``name``, to whose debug() TORCH_LOGS=name listens. Raises ValueError where torch does not know
    the name."""
    return _logging.getArtifactLogger(module, name)


def is_traced() -> bool:
    """Whether somebody reads what ``trace_artifact`` is given: TORCH_TRACE says where to write it."""
    return bool(_logging.trace_log.handlers)


def trace_artifact(name: str, encoding: str, content: Callable[[], str]) -> None:
    """Adds a text to the trace of what is being compiled, of which tlparse makes a file. ``encoding``: "string" or "json"."""
    _logging.trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=content)


# ------------------------------------------------------------------------------------------------------------- processes


def default_store() -> Any:
    """What all processes of the default group read and write, with compare_set(key, expected, desired)."""
    return torch.distributed.distributed_c10d._get_default_store()


def group_named(name: str) -> Any:
    """The process group that has this as its ``group_name``."""
    found: Any = torch.distributed.distributed_c10d
    return found._resolve_process_group(name)


def artifact_manager(kind: str, load: Callable[[str, bytes], None]) -> Any:
    """What keeps artifacts for ``save_cache_artifacts``, with record_artifact(kind, key, content), and has ``load`` take those
    of ``kind`` that ``load_cache_artifacts`` brings.

    Imported when it is asked for: a torch that has another costs nobody more than saved kernels.
    """
    from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

    class Artifact(CacheArtifact):
        def populate_cache(self) -> None:
            load(self.key, self.content)

        @staticmethod
        def type() -> str:
            return kind

    CacheArtifactFactory.register(Artifact)
    return CacheArtifactManager
