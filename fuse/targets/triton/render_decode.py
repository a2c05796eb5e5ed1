"""Few queries against many keys, as one Triton module: parts of the keys, and what merges them.

Query heads that share keys and values are rows of one tile (see fuse.kernel.sharing), so that keys are read once, and matrix
units have rows to work on.
"""

from __future__ import annotations

from fuse.ir.interval import MAX_LENGTH
from fuse.ir.spec import AttentionSpec
from fuse.kernel import sharing
from fuse.kernel.source import ENTRY
from fuse.targets.triton.outline import rendered
from fuse.targets.triton.plan import TritonPlan
from fuse.targets.triton.render import TritonSource, call_context, header
from fuse.targets.triton.walk import Limit, Walk

MERGE = "fuse_attention_merge"


def render_decode(spec: AttentionSpec, plan: TritonPlan) -> str:
    """Kernels ENTRY, which attends to one part of the keys, and MERGE."""
    runs = list(enumerate(sharing.runs(spec)))
    shared = [(i, run) for i, run in runs if run != 1]
    source = TritonSource(sharing.grouped(spec), frozenset({"q", *(f"b{i}" for i, _ in shared)}))
    context = call_context(source, plan) | {
        "entry": ENTRY, "merge": MERGE, "walk": Walk("k", _limits(source), full=False, reduced=True),
        "runs": runs, "shared": shared, "max_length": MAX_LENGTH,
    }  # fmt: skip
    return rendered("decode", spec, header(spec, plan), context)


def _limits(source: TritonSource) -> list[Limit]:
    """Of the keys that any row sees."""
    texts = {"lower": ("begin", "tl.min(tl.where(q_ok, {}, kv_len))"), "upper": ("end", "tl.max(tl.where(q_ok, {}, 0))")}
    found = ((*texts[b.name], source.writer().value(b.node)) for b in source.computed.bounds)
    return [Limit(name, (), text.format(value)) for name, text, value in found]
