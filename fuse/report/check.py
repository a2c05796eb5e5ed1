"""FUSE_VERIFY: every compiled graph is followed by the graph as it was, and their outputs are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fuse.errors import VerificationFailed
from fuse.report.site import Site
from fuse.torch_private import pytree

# Relative error in the Euclidean norm that reassociation may cost in a whole model, by the dtype of the output.
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def keep(gm: GraphModule) -> GraphModule:
    """A copy, with the bodies of higher-order ops, that passes and inner compiler leave alone; parameters are shared."""
    kept = GraphModule(gm, copy.deepcopy(gm.graph))
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(body := getattr(gm, str(node.target), None), GraphModule):
            setattr(kept, str(node.target), keep(body))
    return kept


def against(original: GraphModule, compiled: Callable[..., Any], sites: Sequence[Site]) -> Callable[..., Any]:
    """``compiled``, but every call raises VerificationFailed where ``original`` gives something else.

    Graphs that draw random numbers are let through: fused dropout has the same distribution, not the same numbers.
    """

    def run(*args: Any) -> Any:
        expected, again = (_without_effects(original, args, seed) for seed in (0, 1))
        got = compiled(*args)
        for index, (e, a, g) in enumerate(zip(expected, again, got, strict=True)):
            if isinstance(e, torch.Tensor) and e.dtype in ALLOWED and torch.equal(e.nan_to_num(), a.nan_to_num()):
                _compare(e, g.detach(), index, sites)
        return got

    return run


def _without_effects(gm: GraphModule, args: Sequence[Any], seed: int) -> Sequence[Any]:
    copies = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, tuple(args))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        outputs: Sequence[Any] = gm(*copies)
    return outputs


def _compare(expected: torch.Tensor, got: torch.Tensor, index: int, sites: Sequence[Site]) -> None:
    allowed = ALLOWED[expected.dtype]
    e, g = expected.double(), got.double()
    same = torch.equal(e.isnan(), g.isnan()) and torch.equal(e.isinf(), g.isinf())
    finite = e.isfinite() & g.isfinite()
    error = (torch.linalg.vector_norm((e - g)[finite]) / torch.linalg.vector_norm(e[finite]).clamp_min(1e-30)).item()
    if not same or error > allowed:
        where = ", ".join(sorted({site.where for site in sites if site.recovered})) or "none fused"
        raise VerificationFailed(index=index, error=error if same else float("inf"), allowed=allowed, sites=where)
