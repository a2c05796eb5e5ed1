"""AttentionSpec: what one attention site computes; the one data type between the passes and code generation.

For every batch index b = (b0, …), query position q and value feature e:

    s(b, q, k) = score(b, q, k)                              an expression over sum_d query[b,q,d] * key[b,k,d]
    p          = normalisation over k of s:
                 "softmax"  exp(s) / (sum over k of exp(s) + sum of exp(extra_logits))
                 "sum"      s / sum over k of s
                 "none"     s
    out[b,q,e] = sum over k of weight(p, b, q, k) * value[b, k, e]

Sizes are given at run time; only ``qk_dim`` and ``v_dim`` are part of the spec. A spec is hashable and has one canonical
JSON text, which is what the graph carries and what caches are keyed on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fuse.ir import expr, serial, welltyped
from fuse.ir.expr import Expr, Load
from fuse.ir.welltyped import InvalidExpr

VERSION = 2
NORMALISATIONS = ("softmax", "sum", "none")
IntLike = Any  # int, or torch.SymInt while a graph is traced


class InvalidSpec(ValueError):
    """A spec that no pass may produce; always a defect of fuse."""


@dataclass(frozen=True)
class Operand:
    """A tensor the kernel reads, with any strides."""

    rank: int
    dtype: str


@dataclass(frozen=True)
class Mask:
    """What is known about entries that carry no weight. Optional knowledge: ``score`` alone is always right.

    Of a softmax: where ``predicate`` is false, the score is at most ``fill``; such an entry weighs exactly nothing in a row
    whose largest score exceeds ``fill`` + 256 (exp underflows in every float dtype below float64). Rows for which that does
    not hold, the fully masked ones, must be computed from ``score`` over all keys.
    Of other normalisations: where ``predicate`` is false, the score is zero, and so is ``fill``.

    predicate   bool over batch, q, k: true where the entry is visible
    visible     the score where ``predicate`` holds, free of the mask
    lower       smallest k that may be visible to row q (over batch and q; never decreases with q), None: 0
    upper       one past the largest such k (likewise), None: kv_len
    residual    what, beside lower <= k < upper, ``predicate`` still asks for; None: nothing
    fill        largest score a masked entry of a softmax can have: -inf, or a large negative number; else 0
    tiles       reads a TileMap of ``residual`` at the cell of (q, k); None where there is none
    """

    predicate: Expr
    visible: Expr
    lower: Expr | None
    upper: Expr | None
    residual: Expr | None
    fill: float
    tiles: Load | None = None

    def lines(self, normalisation: str) -> list[str]:
        """What is known, for people."""
        bounds = [f"{x} {sign} k" for x, sign in ((self.lower, "<="),) if x is not None]
        bounds += [f"k < {self.upper}"] * (self.upper is not None)
        asked = [*bounds, *([] if self.residual is None else [str(self.residual)])]
        return [
            f"visible where {self.predicate}, that is {' and '.join(asked) or 'everywhere'}",
            f"    there the softmax is of {self.visible}, elsewhere of at most {self.fill:g}"
            if normalisation == "softmax"
            else f"    there the score is {self.visible}, elsewhere zero",
            *([] if self.tiles is None else [f"    its tiles are told by {self.tiles}"]),
        ]


@dataclass(frozen=True)
class AttentionSpec:
    """See the module's text for the formula.

    batch         number of batch dimensions, their indices are b0, b1, …, their sizes the symbols B0, B1, …
    operands      the tensors, numbered as Load.operand counts; one tensor may hold query, key and value
    query         its element (b, q, d); linear in q and d
    key           its element (b, k, d); linear in k and d
    value         its element (b, k, e); linear in k and e
    score         fed to the normalisation; float, dtype as eager's
    mask          see Mask
    extra_logits  scores that join the softmax but have no value: attention sinks, softmax-plus-one (over b and q)
    weight        over Prob, b, q, k: linear in Prob and zero where Prob is; Prob itself as a rule
    empty_row     a row without any finite score of a softmax: "nan" as softmax gives, or "zero" as SDPA documents
    out_dtype     dtype of the result
    out_order     the result's dimensions (0…batch-1 the batch ones, batch: q, batch+1: e) from outermost to innermost
                  in memory; the result's logical shape is always (B0, …, q_len, v_dim)
    extra         names of further int64 symbols, in the order in which the op receives them
    normalisation one of NORMALISATIONS; "none" and "sum" have no extra logits
    """

    batch: int
    qk_dim: int
    v_dim: int
    operands: tuple[Operand, ...]
    query: Load
    key: Load
    value: Load
    score: Expr
    mask: Mask | None
    extra_logits: tuple[Expr, ...]
    weight: Expr
    empty_row: str
    out_dtype: str
    out_order: tuple[int, ...]
    extra: tuple[str, ...] = ()
    normalisation: str = "softmax"

    @property
    def softmax(self) -> bool:
        return self.normalisation == "softmax"

    @property
    def normalised(self) -> str:
        """The probability of an entry, but for extra logits, for people."""
        return _NORMALISED[self.normalisation].format(self.score)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the int64 arguments, in the order in which the op receives them."""
        return (*(f"B{i}" for i in range(self.batch)), "q_len", "kv_len", *self.extra)

    def out_shape(self, sizes: Sequence[IntLike]) -> tuple[IntLike, ...]:
        """(B0, …, q_len, v_dim), from the values of ``symbols``."""
        return (*sizes[: self.batch + 1], self.v_dim)

    def out_strides(self, sizes: Sequence[IntLike]) -> tuple[IntLike, ...]:
        """Strides in elements of a result that is dense in the order ``out_order``."""
        shape = self.out_shape(sizes)
        strides: list[IntLike] = [1] * len(shape)
        step: IntLike = 1
        for dim in reversed(self.out_order):
            strides[dim] = step
            step = step * shape[dim]
        return tuple(strides)

    def lse_shape(self, sizes: Sequence[IntLike]) -> tuple[IntLike, ...]:
        """(B0, …, q_len): the shape of what normalises the rows, which is dense: see fuse.ir.gradient."""
        return tuple(sizes[: self.batch + 1])

    @cached_property
    def lse_dtype(self) -> str:
        """float64 where the scores are computed in it."""
        return "float64" if any(n.dtype == "float64" for n in expr.walk(*self.roots().values())) else "float32"

    def mapped(self, f: Callable[[Expr], Expr]) -> AttentionSpec:
        """The spec with f applied to every expression."""
        roots = {name: f(root) for name, root in self.roots().items()}
        return dataclasses.replace(self, **_expressions(roots, None if self.mask is None else self.mask.fill))

    def pruned(self) -> tuple[AttentionSpec, tuple[int, ...]]:
        """The spec without operands that nothing loads, and what the numbers of the others were, in their order."""
        roots = list(self.roots().values())
        renumbered, read = expr.renumbered(roots)
        spec = self.mapped(dict(zip(roots, renumbered, strict=True)).__getitem__)
        return dataclasses.replace(spec, operands=tuple(self.operands[i] for i in read)), read

    def roots(self) -> dict[str, Expr]:
        """Every expression of the spec by name."""
        found = {name: getattr(self, name) for name in _OF_SPEC}
        found |= {f"extra_logits.{i}": x for i, x in enumerate(self.extra_logits)}
        found |= {f"mask.{name}": getattr(self.mask, name, None) for name in _OF_MASK}
        return {name: x for name, x in found.items() if x is not None}

    def __str__(self) -> str:
        """The formula, a line for each of its parts."""
        at = ", ".join([*(f"b{i}" for i in range(self.batch)), "q", "e"])
        joined = "".join(f", with {x} in the sum" for x in self.extra_logits)
        return "\n".join(
            [
                f"out[{at}] = sum over k of {self.weight} * {self.value}",
                f"prob = {self.normalised}{joined}",
                f"score = sum over d of {self.query} * {self.key}",
                *([] if self.mask is None else self.mask.lines(self.normalisation)),
            ]
        )

    def to_json(self) -> str:
        """Canonical text: equal specs give equal texts."""
        data: dict[str, Any] = {
            "version": VERSION, "batch": self.batch, "qk_dim": self.qk_dim, "v_dim": self.v_dim,
            "operands": [[o.rank, o.dtype] for o in self.operands], "expr": serial.to_json(self.roots()),
            "fill": None if self.mask is None else self.mask.fill.hex(), "empty_row": self.empty_row,
            "out_dtype": self.out_dtype, "out_order": self.out_order, "extra": self.extra, "normalisation": self.normalisation,
        }  # fmt: skip
        return json.dumps(data, separators=(",", ":"), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> AttentionSpec:
        data = serial.loads(text)
        if data["version"] != VERSION:
            raise InvalidSpec(f"spec version {data['version']}; this fuse reads version {VERSION}")
        fill = None if data["fill"] is None else float.fromhex(data["fill"])
        return AttentionSpec(
            batch=data["batch"], qk_dim=data["qk_dim"], v_dim=data["v_dim"],
            operands=tuple(Operand(*o) for o in data["operands"]), empty_row=data["empty_row"], out_dtype=data["out_dtype"],
            out_order=tuple(data["out_order"]), extra=tuple(data["extra"]), normalisation=data["normalisation"],
            **_expressions(serial.from_json(data["expr"]), fill),
        )  # fmt: skip


_NORMALISED = {"softmax": "softmax over k of {}", "sum": "{0} / sum over k of {0}", "none": "{}, without a softmax"}
# The fields that are expressions; "extra_logits" are numbered.
_OF_SPEC = ("query", "key", "value", "score", "weight")
_OF_MASK = ("predicate", "visible", "lower", "upper", "residual", "tiles")


def _expressions(roots: Mapping[str, Expr], fill: float | None) -> dict[str, Any]:
    """The fields of a spec, from what ``roots`` gives; ``fill``: of its mask, if it has one."""
    for name in ("query", "key", "value", "mask.tiles"):
        if not isinstance(roots.get(name), Load | None):
            raise InvalidSpec(f"query, key, value and the map of tiles must be loads, not {roots[name]}")
    of_mask: dict[str, Any] = {name: roots.get(f"mask.{name}") for name in _OF_MASK}
    found: dict[str, Any] = {name: roots[name] for name in _OF_SPEC}
    extra_logits = (roots[f"extra_logits.{i}"] for i in range(sum(n.startswith("extra_logits.") for n in roots)))
    return found | {"extra_logits": tuple(extra_logits), "mask": None if fill is None else Mask(**of_mask, fill=fill)}


def verify(spec: AttentionSpec) -> None:
    """Raises InvalidSpec if ``spec`` breaks an invariant of AttentionSpec."""
    batch = frozenset(f"b{i}" for i in range(spec.batch))
    row, entry = batch | {"q"}, batch | {"q", "k"}
    scope = {"query": row | {"d"}, "key": batch | {"k", "d"}, "value": batch | {"k", "e"}, "mask.lower": row, "mask.upper": row}
    ranks = {i: o.rank for i, o in enumerate(spec.operands)}
    known = set(spec.symbols)
    for name, root in spec.roots().items():
        allowed = scope.get(name, row if name.startswith("extra_logits") else entry)
        try:
            welltyped.verify(root, axes_allowed=frozenset(allowed), operand_ranks=ranks)
        except InvalidExpr as e:
            raise InvalidSpec(f"{name}: {e}") from None
        if unknown := set(expr.symbols(root)) - known:
            raise InvalidSpec(f"{name} reads the symbols {sorted(unknown)}; the spec has {spec.symbols}")
    _verify_types(spec)
    if sorted(spec.out_order) != list(range(spec.batch + 2)):
        raise InvalidSpec(f"out_order {spec.out_order} is no permutation of {spec.batch + 2} dimensions")
    if spec.empty_row not in ("nan", "zero"):
        raise InvalidSpec(f"empty_row {spec.empty_row!r} is neither 'nan' nor 'zero'")
    if spec.normalisation not in NORMALISATIONS:
        raise InvalidSpec(f"normalisation {spec.normalisation!r} is none of {NORMALISATIONS}")
    if spec.extra_logits and not spec.softmax:
        raise InvalidSpec(f"extra logits join a softmax, not the normalisation {spec.normalisation!r}")
    if spec.qk_dim < 1 or spec.v_dim < 1:
        raise InvalidSpec(f"qk_dim {spec.qk_dim} and v_dim {spec.v_dim} must be positive")


def _verify_types(spec: AttentionSpec) -> None:
    allowed = {"mask.predicate": ("bool",), "mask.residual": ("bool",), "mask.lower": ("int64",), "mask.upper": ("int64",),
               "mask.visible": (spec.score.dtype,), "mask.tiles": ("uint8",)}  # fmt: skip
    for name, root in spec.roots().items():
        types = allowed.get(name, expr.FLOATS)
        if root.dtype not in types:
            raise InvalidSpec(f"{name} is {root.dtype}, not {' or '.join(types)}")
        if expr.contains(root, expr.Prob) and name != "weight":
            raise InvalidSpec(f"{name} reads the probability")
        if expr.contains(root, expr.Score) and name not in ("score", "mask.visible"):
            raise InvalidSpec(f"{name} reads the score")
    for n in expr.walk(*spec.roots().values()):
        if isinstance(n, Load) and n.dtype != spec.operands[n.operand].dtype:
            raise InvalidSpec(f"{n} is {n.dtype}, its operand {spec.operands[n.operand].dtype}")
    if spec.out_dtype not in expr.FLOATS:
        raise InvalidSpec(f"out_dtype {spec.out_dtype!r} is not a float")
    if spec.mask is not None and not (spec.mask.fill <= -1e3 if spec.softmax else spec.mask.fill == 0):
        raise InvalidSpec(f"mask.fill {spec.mask.fill} does not vanish")
