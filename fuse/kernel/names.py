"""What files of kernels are called: by what they compute, so that a folder of them can be read."""

from __future__ import annotations

from collections.abc import Iterator

from fuse.ir.expr import Apply, Const, Expr, Load, Symbol, axes, index, walk
from fuse.ir.philox import drawn_in
from fuse.ir.spec import AttentionSpec
from fuse.report.wording import members

_K, _Q = index("k"), index("q")
_MASKED = "masked"  # by what has no name


def kernel_name(spec: AttentionSpec, part: str = "") -> str:
    """ "causal_padded_backward_float32_64x64": mask, what the score has beside its scale, ``part``, dtype, features."""
    words = list(dict.fromkeys((*_of_mask(spec), *_beside(spec)))) or ["attention"]
    return "_".join([*words, *[part] * bool(part), spec.out_dtype, f"{spec.qk_dim}x{spec.v_dim}"])


def _of_mask(spec: AttentionSpec) -> Iterator[str]:
    if spec.mask is not None:
        yield from sorted(_condition(c) for c in members(spec.mask.predicate, "and"))


def _condition(c: Expr) -> str:
    """One of those that must all hold, as fuse.report.wording solves them."""
    loads = [n for n in walk(c) if isinstance(n, Load)]
    if not loads:
        return _of_indices(c)
    if all(axes(n) & {"q", "k"} <= {"k"} for n in loads) and "q" not in axes(c):
        return "padded"
    left, right = c.operands if isinstance(c, Apply) and len(c.operands) == 2 else (c, c)
    if left is _K and isinstance(right, Load) and "k" not in axes(right):
        return "ranges"
    compares = isinstance(c, Apply) and c.op == "eq" and isinstance(left, Load) and isinstance(right, Load)
    return "documents" if compares and {"q", "k"} <= axes(c) else _MASKED


def _of_indices(c: Expr) -> str:
    if not isinstance(c, Apply) or len(c.operands) != 2:
        return _MASKED
    left, right = c.operands
    if left is _K and _from_query(right):
        return {"le": "causal", "lt": "causal", "gt": "window", "ge": "window"}.get(c.op, _MASKED)
    distance = isinstance(left, Apply) and left.op in ("sub", "abs") and axes(left) == {"q", "k"}
    return "window" if distance and c.op in ("le", "lt") and not axes(right) else _MASKED


def _from_query(e: Expr) -> bool:
    """The query's position, as counted from somewhere else."""
    if isinstance(e, Apply) and e.op in ("add", "sub"):
        return _from_query(e.operands[0]) != _from_query(e.operands[1]) and not any(isinstance(n, Load) for n in walk(e))
    return e is _Q


def _beside(spec: AttentionSpec) -> Iterator[str]:
    score = spec.score if spec.mask is None else spec.mask.visible
    if any(isinstance(n, Apply) and n.op == "tanh" for n in walk(score)):
        yield "softcap"
    if any(isinstance(n, Load) for n in walk(score)):
        yield "bias"
    elif axes(score) & {"q", "k"}:
        yield "distances"
    if not spec.softmax:
        yield "by_sum" if spec.normalisation == "sum" else "unnormalised"
    if spec.extra_logits:
        constant = all(isinstance(n, (Const, Symbol)) for logit in spec.extra_logits for n in walk(logit))
        yield "plus_one" if constant else "sinks"
    if drawn_in(*spec.roots().values()):
        yield "dropout"
