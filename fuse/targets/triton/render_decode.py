"""Few queries against many keys, as one Triton module: parts of the keys, and what merges them.

Query heads that share keys and values are rows of one tile (see fuse.kernel.sharing), so that keys are read once, and matrix
units have rows to work on.
"""

from __future__ import annotations

from fuse.ir.interval import MAX_LENGTH
from fuse.ir.spec import AttentionSpec
from fuse.kernel import sharing
from fuse.kernel.source import ENTRY, environment
from fuse.targets.triton.plan import TritonPlan
from fuse.targets.triton.render import TritonSource, call_context, header

MERGE = "fuse_attention_merge"


def render_decode(spec: AttentionSpec, plan: TritonPlan) -> str:
    """Kernels ENTRY, which attends to one part of the keys, and MERGE; arguments as ``launch_decode`` has them."""
    runs = list(enumerate(sharing.runs(spec)))
    shared = [(i, run) for i, run in runs if run != 1]
    source = TritonSource(sharing.grouped(spec), frozenset({"q", *(f"b{i}" for i, _ in shared)}))
    context = call_context(source, plan) | {
        "header": header(spec, plan), "entry": ENTRY, "merge": MERGE,
        "bounds": [(b.name, source.writer().value(b.node)) for b in source.computed.bounds],
        "runs": runs, "shared": shared, "max_length": MAX_LENGTH,
    }  # fmt: skip
    return environment().get_template("triton/decode.py.jinja").render(context)
