"""The weights of a spec as one Triton module: a program owns a tile, and adds up heads where their mean is asked for."""

from __future__ import annotations

from dataclasses import replace

from fuse.ir.spec import AttentionSpec
from fuse.kernel.backward import recomputed_above, recomputed_below
from fuse.kernel.destinations import Unsupported
from fuse.targets.triton.outline import rendered
from fuse.targets.triton.plan import TritonPlan
from fuse.targets.triton.render import TritonSource, call_context

WEIGHTS = "fuse_weights"


def render_weights(spec: AttentionSpec, plan: TritonPlan) -> str:
    """The kernel WEIGHTS. Raises Unsupported."""
    if not spec.softmax:
        raise Unsupported("weights of rows that have no log-sum-exp")
    source, below = TritonSource(spec), recomputed_below(spec)
    context = call_context(source, replace(plan, stages=1)) | {
        "entry": WEIGHTS, "rewritten": below is not None, "recomputed_below": repr(below),
        "recomputed_above": repr(recomputed_above(spec.lse_dtype)), "log2_e": "1.4426950408889634",
        "recomputed": None if below is None else source.program(spec.score, 1.0, ["k_ok"], as_eager=True),
    }  # fmt: skip
    header = [f"weights {spec.weight}, or their mean over the last batch indices", f"softmax over k of {spec.score}",
              f"weights of  {spec.to_json()}", f"plan  {plan}"]  # fmt: skip
    return rendered("weights", spec, header, context)
