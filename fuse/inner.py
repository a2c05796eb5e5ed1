"""The inner compiler: what becomes of everything in a graph that is no fused attention.

Inductor has attention patterns of its own, which it tries on the joint graph of every compilation. They take any dimension of
a softmax for the keys' and constants for wildcards, so that a site which fuse declined with a reason would be replaced after
all, by another function. There is no setting for these patterns alone. Every one of them holds a softmax, which is written
with ``aten::exp`` by then: it bears another name, ``fuse::exp``, for as long as patterns are tried. Renaming and naming back
are passes that Inductor calls before and after, set for one compilation; their ids are part of the keys of torch's caches, so
that no graph is handed over that was compiled with the patterns on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from fuse.errors import GET_COMPILER
from fuse.ops import written
from fuse.options import Options
from fuse.torch_private import CustomGraphPass, Inductor, OpOverload, inductor_config, lookup_backend

_library: Any = torch.library.Library("fuse", "FRAGMENT")
_library.define("exp(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.pointwise))
_library.impl("exp", torch.exp, "CompositeExplicitAutograd")
torch.library.register_fake("fuse::exp", torch.exp, lib=_library)


def compiler(chosen: Options, patterns: bool) -> Callable[..., Any]:
    """The compiler of graphs (graph module, example inputs) → callable that ``chosen`` names.

    patterns  whether Inductor may look for attention itself, as it does in graphs that fuse does not look at
    """
    if chosen.inner == "eager":
        return lambda gm, example_inputs: gm.forward
    if chosen.inner == "aot_eager":
        return lookup_backend("aot_eager")
    if patterns:
        return Inductor(chosen.mode, dict(chosen.inductor), dynamic=None)
    written.register()
    options = dict(chosen.inductor) | without_patterns(chosen.inductor)
    return partial(_inductor_or_else, Inductor(chosen.mode, options, dynamic=None))


def _inductor_or_else(inductor: Callable[..., Any], gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Where there is no C++ compiler, "aot_eager" in Inductor's place, with a warning."""
    try:
        found: Callable[..., Any] = inductor(gm, example_inputs)
    except Exception as error:
        if not any(type(e).__name__ == "InvalidCxxCompiler" for e in _causes(error)):
            raise
        warnings.warn(
            f"Inductor has no C++ compiler, so that the graph runs operator by operator. {GET_COMPILER}",
            RuntimeWarning,
            stacklevel=2,
        )
        found = lookup_backend("aot_eager")(gm, list(example_inputs))
    return found


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def without_patterns(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of Inductor that keep its attention patterns from what they are used for, beside the user's ``options``."""
    plain, hidden = torch.ops.aten.exp.default, torch.ops.fuse.exp.default
    return {
        "joint_custom_pre_pass": Passes(*_given(options, "joint_custom_pre_pass"), Rename(plain, hidden)),
        "joint_custom_post_pass": Passes(Rename(hidden, plain), *_given(options, "joint_custom_post_pass")),
    }


class Rename(CustomGraphPass):
    """Calls of ``old`` become calls of ``new``, which computes the same."""

    def __init__(self, old: OpOverload[..., Any], new: OpOverload[..., Any]) -> None:
        self._old, self._new = old, new

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=self._old):
            node.target = self._new

    def uuid(self) -> str:
        return f"{self._old} is {self._new}"


class Passes(CustomGraphPass):
    """Several as one, in order: not every version of torch takes a list."""

    def __init__(self, *passes: Callable[[Graph], None]) -> None:
        self._passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """None, which keeps torch from caching, if a pass has no id, as Inductor has it for each."""
        ids = tuple(each.uuid() if isinstance(each, CustomGraphPass) else None for each in self._passes)
        return (written.FORM, *ids) if all(ids) else None


def _given(options: Mapping[str, Any], name: str) -> Sequence[Callable[[Graph], None]]:
    """The user's own passes under ``name``, for this compilation or for all."""
    given = options.get(name, getattr(inductor_config, name))
    if given is None:
        return ()
    return given if isinstance(given, (list, tuple)) else (given,)
