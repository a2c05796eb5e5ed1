"""Few queries against many keys, as one Triton module: parts of the keys, and what merges them.

Query heads that share keys and values are rows of one tile (see fuse.sharing), so that keys are read once, and matrix
units have rows to work on.
"""

from __future__ import annotations

from fuse import sharing
from fuse.codegen.cpp import MAX_LENGTH
from fuse.codegen.render import ENTRY, environment
from fuse.codegen.render_triton import Source, bounds_of, call_context, header
from fuse.planner_triton import TritonPlan
from fuse.spec import AttentionSpec

MERGE = "fuse_attention_merge"


def render_decode(spec: AttentionSpec, plan: TritonPlan) -> str:
    """Kernels ENTRY, which attends to one part of the keys, and MERGE; arguments as ``fuse.runtime.triton_decode`` has them."""
    runs = list(enumerate(sharing.runs(spec)))
    shared = [(i, run) for i, run in runs if run != 1]
    source = Source(sharing.grouped(spec), frozenset({"q", *(f"b{i}" for i, _ in shared)}))
    context = call_context(source, plan) | {
        "header": header(spec, plan), "entry": ENTRY, "merge": MERGE,
        "bounds": [(name, source.writer().value(node)) for name, node in bounds_of(source.spec)],
        "runs": runs, "shared": shared, "max_length": MAX_LENGTH,
    }  # fmt: skip
    return environment().get_template("triton/decode.py.jinja").render(context)
