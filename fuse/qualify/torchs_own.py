"""The same attention as torch has it: one call of F.scaled_dot_product_attention where it can say it; without a softmax two
products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse.ir.expr import FLOATS, Apply, Const, Expr, Index, Load, Prob, Score, Symbol, apply, const, contains, index
from fuse.ir.grid import Grid
from fuse.qualify.problem import Problem


@dataclass(frozen=True)
class Parts:
    """A score as SDPA has it: ``scale`` times the product, plus ``biases``."""

    scale: float
    biases: tuple[Expr, ...]


@dataclass(frozen=True)
class Rival:
    """``attend`` takes query, key and value, of which ``wanted`` want a gradient."""

    attend: Callable[..., Tensor]
    matrices: tuple[Tensor, Tensor, Tensor]
    wanted: tuple[bool, bool, bool]


def rival(p: Problem, wanted: Sequence[bool], weights: bool = False) -> Rival | None:
    """What torch has for the problem; None where it has nothing that could be called.

    weights  they are made as well, in the operations that a model writes: no operator gives them
    """
    spec = p.spec
    views = [_view(load, matrix, p) for load, matrix in ((spec.query, "qd"), (spec.key, "kd"), (spec.value, "ke"))]
    query, key, value = views
    if query is None or key is None or value is None or query.groups != 1 or key.groups != value.groups:
        return None
    call = _sdpa(p, key.groups, weights) if spec.softmax else partial(_products, key.groups)
    of_query, of_key, of_value = (wanted[load.operand] for load in (spec.query, spec.key, spec.value))
    return call and Rival(call, (query.matrix, key.matrix, value.matrix), (of_query, of_key, of_value))


def _products(groups: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The least that scores without a softmax can cost where they are written: one operation on each, between two products."""
    shared = query.unflatten(-3, (-1, groups)) if groups > 1 else query
    key, value = (x.unsqueeze(-3) if groups > 1 else x for x in (key, value))
    return ((shared @ key.mT) * 0.5) @ value


def _sdpa(p: Problem, groups: int, weights: bool) -> Callable[..., Tensor] | None:
    """The problem as SDPA has it, with masks and biases made beforehand; None where SDPA has no such argument."""
    spec = p.spec
    parts = _parts(spec.score if spec.mask is None else spec.mask.visible)
    if parts is None or spec.extra_logits or not isinstance(_plain(spec.weight), Prob):
        return None
    causal = _is_causal(p) and not parts.biases
    mask = None if causal else _mask(p, parts)
    attend = _with_weights if weights else F.scaled_dot_product_attention
    return partial(attend, attn_mask=mask, is_causal=causal, scale=parts.scale, enable_gqa=groups != 1)


def _with_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """As SDPA; weights are made, and nobody keeps them."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    score = query @ key.mT * scale
    if is_causal:
        attn_mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
    if attn_mask is not None:
        score = score.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else score + attn_mask
    return score.softmax(-1).to(value.dtype) @ value


def _plain(e: Expr) -> Expr:
    """Without casts among floats."""
    while isinstance(e, Apply) and e.op == "cast" and e.dtype in FLOATS and e.operands[0].dtype in FLOATS:
        e = e.operands[0]
    return e


def _parts(e: Expr) -> Parts | None:
    e = _plain(e)
    if isinstance(e, Score):
        return Parts(1.0, ())
    if not isinstance(e, Apply) or e.op not in ("add", "mul", "div"):
        return None
    of_score, other = e.operands if e.op == "div" else sorted(e.operands, key=lambda x: not contains(x, Score))
    inner = None if contains(other, Score) else _parts(of_score)
    if inner is None:
        return None
    if e.op == "add":
        return Parts(inner.scale, (*inner.biases, other))
    number = _plain(other)
    if not isinstance(number, Const) or inner.biases:
        return None
    return Parts(inner.scale / float(number.value) if e.op == "div" else inner.scale * float(number.value), ())


def _is_causal(p: Problem) -> bool:
    """SDPA's causal mask, of as many queries as keys."""
    mask, (q_len, kv_len) = p.spec.mask, p.sizes[p.spec.batch : p.spec.batch + 2]
    if mask is None or q_len != kv_len or mask.lower is not None or mask.residual is not None:
        return False
    return mask.upper is apply("add", index("q"), const(1), dtype="int64")


def _mask(p: Problem, parts: Parts) -> Tensor | None:
    """What SDPA takes as attn_mask: truth values, or what is added to scores."""
    spec = p.spec
    extents = {f"b{i}": (0, n) for i, n in enumerate(p.sizes[: spec.batch])}
    extents |= {"q": (0, p.sizes[spec.batch]), "k": (0, p.sizes[spec.batch + 1])}
    grid = Grid.over(extents, dict(zip(spec.symbols, p.sizes, strict=True)), p.operands)
    seen = None if spec.mask is None else grid.evaluate(spec.mask.predicate)
    if not parts.biases:
        return seen
    bias = sum(grid.evaluate(b) for b in parts.biases)
    assert isinstance(bias, Tensor)
    bias = bias.to(p.operands[spec.query.operand].dtype)
    return bias if seen is None else torch.where(seen, bias, spec.mask.fill if spec.mask is not None else 0.0)


@dataclass(frozen=True)
class _View:
    """A matrix for each batch index, of which ``groups`` along the last share one."""

    matrix: Tensor
    groups: int


def _view(load: Load, matrix: str, p: Problem) -> _View | None:
    """As a view of its operand, over the batch and the two axes of ``matrix``, of which one that its place does not tell has
    one position or repeats it; None where its elements do not lie a step apart.
    """
    spec, symbols = p.spec, dict(zip(p.spec.symbols, p.sizes, strict=True))
    last = index(f"b{spec.batch - 1}") if spec.batch else None
    steps = [_steps(coord, symbols, last) for coord in load.coords]
    if any(s is None for s in steps):
        return None
    groups = max((s.groups for s in steps if s is not None), default=1)
    total: dict[str, int] = {}
    for found, stride in zip(steps, p.operands[load.operand].stride(), strict=True):
        for axis, step in found.by.items() if found is not None else ():
            total[axis] = total.get(axis, 0) + step * stride
    lengths = symbols | {"q": symbols["q_len"], "k": symbols["kv_len"], "d": spec.qk_dim, "e": spec.v_dim}
    names = (*(f"b{i}" for i in range(spec.batch)), *matrix)
    sizes = [lengths[name.replace("b", "B") if name.startswith("b") else name] for name in names]
    if groups > 1:
        sizes[spec.batch - 1] //= groups
    strides = [total.get(name, 0) for name in names]
    return _View(p.operands[load.operand].as_strided(sizes, strides, _offset(steps, p.operands[load.operand])), groups)


@dataclass(frozen=True)
class _Steps:
    """A coordinate: ``first``, and by how much it grows with each index; with every ``groups`` of the last batch index."""

    first: int = 0
    by: Mapping[str, int] = field(default_factory=dict)
    groups: int = 1


def _steps(e: Expr, symbols: Mapping[str, int], last: Expr | None) -> _Steps | None:
    if isinstance(e, Const):
        return _Steps(int(e.value))
    if isinstance(e, Symbol):
        return _Steps(symbols[e.name])
    if isinstance(e, Index):
        return _Steps(by={e.axis: 1})
    if not isinstance(e, Apply) or e.op not in ("add", "mul", "floordiv"):
        return None
    left, right = e.operands
    if e.op == "floordiv":
        divides = left is last and isinstance(left, Index) and isinstance(right, Const)
        return _Steps(by={left.axis: 1}, groups=int(right.value)) if divides else None  # type: ignore[attr-defined]
    a, b = _steps(left, symbols, last), _steps(right, symbols, last)
    if a is None or b is None:
        return None
    groups = max(a.groups, b.groups)
    if e.op == "add":
        return _Steps(a.first + b.first, {x: a.by.get(x, 0) + b.by.get(x, 0) for x in {**a.by, **b.by}}, groups)
    if a.by and b.by:
        return None
    factor, of = (b.first, a) if a.by else (a.first, b)
    return _Steps(of.first * factor, {x: n * factor for x, n in of.by.items()}, groups)


def _offset(steps: Sequence[_Steps | None], operand: Tensor) -> int:
    firsts = (s.first if s is not None else 0 for s in steps)
    return int(operand.storage_offset()) + sum(n * stride for n, stride in zip(firsts, operand.stride(), strict=True))
