"""The same passes for graphs that torch.compile does not bring: exported programs, traced modules, graphs of other backends."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from fuse import backend
from fuse.assumptions import assume
from fuse.errors import NoExample, NotAGraph
from fuse.options import resolve
from fuse.passes.read.graph import LITERAL, NAME, VALUE, State
from fuse.passes.read.propagate import forget, propagate, settle
from fuse.report import required
from fuse.report.check import keep
from fuse.report.report import Report, expected
from fuse.report.site import Reading
from fuse.torch_private import FakeTensorMode, ShapeEnv, detect_fake_mode, given_for, open_sizes, pytree

# Whoever runs a program may differentiate it, and nobody knows under which autocast.
_PLAIN = State(grad=True, transforms=(), autocast=())


class Transformed(NamedTuple):
    """``graph``: of the kind that was given, with its attention as ``fuse::attention``; ``report``: as of ``explain``."""

    graph: Any
    report: Report


def transform(graph: GraphModule | ExportedProgram, /, *args: Any, **kwargs: Any) -> Transformed:
    """Fuses the attention of a graph: ``program, report = fuse.transform(torch.export.export(model, inputs))``.

    graph  an exported program, decomposed or not. The result is another, with the same signature, state and dynamic sizes.
           Or a module that torch.fx.symbolic_trace or make_fx made. The result is a copy that shares its parameters.
           Or a graph that Dynamo gave to a backend. It is rewritten in place and is the result.
    args, kwargs  example inputs of a traced module; the other kinds know theirs. Later calls may have other sizes, except for
           sizes of 0 and 1 and those that the graph holds as numbers: each call is checked, and raises OtherInputs.

    FUSE_TARGET and the devices of the tensors choose what will compute attention. Kernels are built when the graph first runs.
    Raises NotAGraph for anything else, such as a module that was not traced, and NoExample where inputs do not fit.
    """
    if isinstance(graph, ExportedProgram):
        return _exported(graph)
    if not isinstance(graph, GraphModule):
        raise NotAGraph(got=type(graph).__name__)
    if any(VALUE in n.meta for n in graph.graph.nodes):
        return Transformed(graph, expected([rewrite(graph)]))
    return _traced(graph, args, kwargs)


def rewrite(gm: GraphModule, inside: bool = True) -> Reading:
    """Rewrites a graph that a compiler holds, Dynamo's or a program's, in place. ``inside``: with the bodies inside it."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if any(VALUE in n.meta for n in gm.graph.nodes):
        return _rewrite(gm, [_held(n) for n in placeholders], None, inside)
    return _follow(gm, [n.meta.get("val") for n in placeholders], inside)


def _held(node: Node) -> Any:
    """What Dynamo was given for a placeholder, which may be of a subclass that its value does not show."""
    given = given_for(node)
    return node.meta.get(VALUE) if given is None else given


def _rewrite(gm: GraphModule, inputs: Sequence[Any], begins: State | None, inside: bool = True) -> Reading:
    chosen = resolve(None, None)
    if not backend.is_read(inputs, chosen):
        return backend.unread(inputs, chosen)
    reading = backend.rewrite(gm, chosen, inputs, begins, inside)
    if chosen.require:
        required.check(reading.sites)
    return reading


def _follow(gm: GraphModule, inputs: Sequence[Any], inside: bool = True) -> Reading:
    """Rewrites a graph whose nodes hold ``val``, and has them do so again; what it is for, such as sizes, stays as it is."""
    mode = detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes])
    if mode is None:
        return Reading(unread="its nodes hold no fake tensors")
    sizes_stay_open = open_sizes(mode)
    if sizes_stay_open is None:
        return Reading(unread=f"torch {torch.__version__} cannot keep the sizes of a program open: use torch.compile")
    with sizes_stay_open:  # nobody would check what fixes one
        try:
            propagate(gm, inputs, mode, _PLAIN)
        except Exception as error:  # the graph is as good as it was
            forget(gm)
            return _not_followed(error)
        reading = _rewrite(gm, inputs, _PLAIN, inside)
        settle(gm, mode)
    return reading


def _not_followed(error: Exception) -> Reading:
    return Reading(unread=f"its values could not be followed: {type(error).__name__}: {error}")


# ----------------------------------------------------------------------------------------------------- exported programs


def _exported(program: ExportedProgram) -> Transformed:
    gm = keep(program.graph_module)
    placeholders, specs = gm.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs
    reading = _follow(gm, [_example(program, node, spec) for node, spec in zip(placeholders, specs, strict=True)])
    return Transformed(program if reading.unread else _with_graph(program, gm), expected([reading]))


def _example(program: ExportedProgram, node: Node, spec: InputSpec) -> Any:
    """What a placeholder holds, which is told its name in the model. Gradients may be asked of every input of the user's."""
    value = node.meta.get("val")
    node.meta[NAME] = spec.target or ""
    if spec.kind == InputKind.CONSTANT_TENSOR:
        _keep_literal(node, program.constants.get(str(spec.target)))
    if spec.kind == InputKind.USER_INPUT and isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _with_graph(program: ExportedProgram, gm: GraphModule) -> ExportedProgram:
    """``program`` with another graph, whose outputs may have other names."""
    signature = copy.deepcopy(program.graph_signature)
    for spec, node in zip(signature.output_specs, gm.graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        if isinstance(spec.arg, TensorArgument) and isinstance(node, Node):
            spec.arg = TensorArgument(name=node.name)
    return ExportedProgram(
        root=gm, graph=gm.graph, graph_signature=signature, state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints), module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs, constants=program.constants, verifiers=program.verifiers,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- traced modules


def _traced(original: GraphModule, args: Sequence[Any], kwargs: dict[str, Any]) -> Transformed:
    gm = keep(original)
    inputs = _flat(gm, args, kwargs)
    shapes = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fakes = pytree.tree_map_only(Tensor, mode.from_tensor, inputs)
    wanting = pytree.tree_map_only(Tensor, lambda x: x.requires_grad_(x.is_floating_point()), fakes)
    for node in gm.graph.find_nodes(op="get_attr"):
        if str(node.target).startswith("_tensor_constant"):  # the name that tracers give to what is written in the code
            _keep_literal(node, getattr(gm, str(node.target)))
    try:
        propagate(gm, wanting, mode, _PLAIN)
    except Exception as error:
        return Transformed(original, expected([_not_followed(error)]))
    reading = _rewrite(gm, wanting, _PLAIN)
    forget(gm)
    if any(site.recovered for site in reading.sites):
        looked_into = len(gm.graph.find_nodes(op="call_module")) < len(original.graph.find_nodes(op="call_module"))
        assume(gm, fakes, shapes, gm.training if looked_into else None)
    gm.recompile()
    return Transformed(gm, expected([reading]))


def _flat(gm: GraphModule, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """One input for each placeholder. Raises NoExample."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    names = ", ".join(str(n.target) for n in placeholders)
    try:
        bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise NoExample(names=names, problem=error) from error
    bound.apply_defaults()
    flat = list(gm.graph.process_inputs(*bound.args, **bound.kwargs))
    if len(flat) != len(placeholders):
        raise NoExample(names=names, problem=f"{len(flat)} were given")
    return flat


def _keep_literal(node: Node, value: Any) -> None:
    """A number that the code holds as a tensor is read as one, as where Dynamo sees ``torch.tensor(0.0)``."""
    if isinstance(value, Tensor) and value.numel() == 1 and type(value) is Tensor:
        node.meta[LITERAL] = value.item()
