"""The weights of a spec as one C++ source: scores again, and what their log-sum-exp makes of them."""

from __future__ import annotations

from fuse.ir.spec import AttentionSpec
from fuse.kernel.backward import recomputed_above, recomputed_below
from fuse.kernel.destinations import Unsupported
from fuse.kernel.source import environment, made_by
from fuse.targets.cpp.outline import finished
from fuse.targets.cpp.plan import MATRIX_UNITS, Plan, lse_dtype
from fuse.targets.cpp.render import CppSource, call_context


def render_weights(spec: AttentionSpec, plan: Plan) -> str:
    """One self-contained C++ source with the entry point ``ENTRY(const int64_t* arguments)``. Raises Unsupported."""
    if not spec.softmax:
        raise Unsupported("weights of rows that have no log-sum-exp")
    source = CppSource(spec)
    computed, recomputed = source.computed, recomputed_below(spec)
    programs = [source.program("score_full", "Every entry is visible.", computed.visible)]
    if computed.masked:
        programs.append(source.program("score_partial", "Some entries are masked.", computed.visible, masked=True))
    if recomputed is not None:
        programs.append(source.program("score_exact", "As eager rounds, over every key.", spec.score, as_eager=True))
    weight, extra_logits = source.weight(), source.extra_logits()
    header = "\n".join(f"// {line}" for line in _header(spec, plan))
    context = call_context(source, plan) | {
        "header": header, "programs": programs, "weight": weight, "extra_logits": extra_logits,
        "multiplied": plan.isa in MATRIX_UNITS,
        "rewritten": recomputed is not None, "recomputed_below": repr(recomputed), "recomputed": False,
        "recomputed_above": repr(recomputed_above(lse_dtype(spec))),
        "factor": repr(computed.factor), "stage_count": max(len(p.stages) for p in [*programs, weight]),
    }  # fmt: skip
    text = environment().get_template("cpp/lanes/weights.cpp.jinja").render(context)
    return finished(text, header, spec, result=f"{spec.out_dtype} at [{', '.join([*_batch(spec), 'q', 'k'])}], dense")


def _header(spec: AttentionSpec, plan: Plan) -> list[str]:
    return [
        f"out = w = {spec.weight}, or the mean of it over the last batch indices",
        f"softmax over k of {spec.score}" + "".join(f", joined by {x}" for x in spec.extra_logits),
        *([] if spec.mask is None else [f"visible where {spec.mask.predicate}"]),
        f"weights of  {spec.to_json()}", f"plan  {plan}", made_by(),
    ]  # fmt: skip


def _batch(spec: AttentionSpec) -> list[str]:
    return [f"b{i}" for i in range(spec.batch)]
