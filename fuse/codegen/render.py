"""A spec and a plan as one C++ source, by the templates of ``templates/cpp``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import jinja2
import torch

import fuse.templates
from fuse import expr, tiles
from fuse.codegen import keys
from fuse.codegen.cpp import C_TYPES, HALVES, MAX_LENGTH, Body, Draw, Stage, Value, Writer, scalar_function
from fuse.codegen.example import example
from fuse.codegen.ranges_cpp import Ranges, ranges_of
from fuse.expr import Apply, Const, Expr, Load, Prob, Score, const
from fuse.philox import drawn_in
from fuse.planner import Plan, lse_dtype
from fuse.spec import AttentionSpec

ENTRY = "fuse_attention"

# A row whose largest score lies this far above the fill gives masked entries no weight (see fuse.spec.Mask).
_FILL_MARGIN = 256.0
# Below this, 16-bit roundings in eager swallow part of a score, so such rows are computed with the same roundings.
_ROUNDING_LIMIT = -1000.0
# Additive masks hold -1e4 or less: a score below this does not tell how large the visible ones of its row will be.
_MASKED_SCORE = -9000.0


@dataclass
class Program:
    """One score program: what is computed per key (scalars) and per vector of queries and key."""

    name: str
    comment: str
    result: str = ""
    key: Body = field(default_factory=Body)
    entry: Body = field(default_factory=lambda: Body(lanes=True))
    stages: list[Stage | Draw] = field(default_factory=list)


@dataclass(frozen=True)
class Access:
    name: str
    ctype: str
    operand: int
    offset: str


@dataclass(frozen=True)
class Bound:
    name: str
    text: str


class Source:
    """Collects the pieces of one source; members shared by all programs live in ``site`` and ``rows``."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.count = [0]
        self.site = Body(prefix="s.")
        self.rows = Body(lanes=True, prefix="r.", suffix="[v]")

    def function(self, node: Expr) -> str:
        return scalar_function(lambda w: w.value(node).text, self.count)

    def access(self, name: str, load: Load) -> Access:
        return Access(name, C_TYPES[load.dtype], load.operand, scalar_function(lambda w: w.offset(load), self.count))

    def writer(self, program: Program | None = None, exact: bool = False) -> Writer:
        def place(axes: frozenset[str]) -> Body:
            varying = axes & {"q", "k"}
            if program is None or varying <= {"q"}:
                return self.rows if varying else self.site
            return program.key if varying == {"k"} else program.entry

        stages: list[Stage | Draw] = [] if program is None else program.stages
        return Writer(place, exact, stages, {}, self.count)

    def program(self, name: str, comment: str, node: Expr, exact: bool = False, predicate: Expr | None = None) -> Program:
        """The score ``node`` of every entry; with ``predicate``, -inf outside the mask's bounds and where it is false."""
        program = Program(name, comment)
        writer = self.writer(program, exact)
        for leaf in expr.walk(node):
            if isinstance(leaf, Score):
                writer.leaves[leaf] = Value("score", "real", True)
        program.result = writer.value(node).spread("real")
        if predicate is not None:
            allowed = " & ".join(self.bounds() + ([] if _true(predicate) else [f"({writer.value(predicate).spread('bool')})"]))
            program.entry.lines.append(f"const VR visible = select({allowed}, {program.result}, vr(-R(INFINITY)));")
            program.result = "visible"
        return program

    def bounds(self) -> list[str]:
        mask = self.spec.mask
        lower = ["(vi(k) >= r.lower[v])"] if mask is not None and mask.lower is not None else []
        upper = ["(vi(k) < r.upper[v])"] if mask is not None and mask.upper is not None else []
        return lower + upper

    def weight(self) -> Program:
        program = Program("weigh", "")
        writer = self.writer(program)
        for leaf in expr.walk(self.spec.weight):
            if isinstance(leaf, Prob):
                writer.leaves[leaf] = Value("prob", "real", True)
        program.result = writer.value(self.spec.weight).spread("real")
        return program

    def extra_logits(self) -> list[str]:
        return [self.writer().value(node).spread("real") for node in self.spec.extra_logits]


def _true(node: Expr) -> bool:
    return isinstance(node, Const) and node.value is True


_LEAST, _MOST = 1e-30, 1e30  # of a factor that is peeled: far from what overflows


def peel(node: Expr) -> tuple[Expr, float]:
    """(inner, c) with node = c * inner, c > 0: the factor then joins the one that softmax in base 2 needs anyway."""
    factor = 1.0
    while isinstance(node, Apply):
        if node.op == "cast" and node.operands[0].dtype in expr.FLOATS:
            node = node.operands[0]
            continue
        found = _factor(node)
        if found is None:
            break
        node, factor = found[0], factor * found[1]
    if isinstance(node, Const) and node.dtype in expr.FLOATS and _LEAST < node.value < _MOST:
        return const(1.0, node.dtype), factor * float(node.value)
    return node, factor


def _factor(node: Apply) -> tuple[Expr, float] | None:
    if node.op not in ("mul", "div"):
        return None
    for this, other in ((node.operands[0], node.operands[1]), (node.operands[1], node.operands[0])):
        positive = isinstance(other, Const) and _LEAST < other.value < _MOST
        if positive and isinstance(other, Const) and (node.op == "mul" or other is node.operands[1]):
            return this, float(other.value) if node.op == "mul" else 1 / float(other.value)
    return None


def threshold_of(spec: AttentionSpec) -> float | None:
    """Rows whose largest score is not above this are computed again from every key; None where none needs to be."""
    halves = any(isinstance(n, Apply) and n.dtype in HALVES for n in expr.walk(spec.score))
    unmasked = spec.score if spec.mask is None else spec.mask.visible
    biased = any(
        isinstance(n, Load) or (isinstance(n, Const) and n.dtype in expr.FLOATS and abs(n.value) >= -_ROUNDING_LIMIT)
        for n in expr.walk(unmasked)
    )
    rounding = _ROUNDING_LIMIT if halves and biased else None
    if spec.mask is None:
        return rounding
    return max(spec.mask.fill + _FILL_MARGIN, rounding or -math.inf) if math.isfinite(spec.mask.fill) else None


def render(spec: AttentionSpec, plan: Plan) -> str:
    """One self-contained C++ source with the entry point ``ENTRY(const int64_t* arguments)``."""
    source = Source(spec)
    mask = spec.mask
    visible, factor = peel(spec.score if mask is None else mask.visible)
    residual = residual_of(spec)
    programs = [source.program("score_full", "Every entry is visible.", visible)]
    if mask is not None:
        predicate = residual if residual is not None else expr.const(True, "bool")
        programs.append(source.program("score_partial", "Some entries are masked.", visible, predicate=predicate))
    threshold = threshold_of(spec)
    if threshold is not None:
        programs.append(source.program("score_exact", "As eager rounds, over every key.", spec.score, exact=True))
    weight = source.weight()
    extra_logits = source.extra_logits()
    context = call_context(source, plan) | {
        "programs": programs, "weight": weight, "extra_logits": extra_logits, "exact": threshold is not None,
        "threshold": repr(threshold), "factor": repr(factor),
        "stage_count": max(len(p.stages) for p in [*programs, weight]), "example": example(spec),
    }  # fmt: skip
    if plan.core == "matrix":
        context |= _matrix_context(source, visible, residual, threshold)
    return environment().get_template(f"cpp/forward_{plan.core}.cpp.jinja").render(context)


def call_context(source: Source, plan: Plan) -> dict[str, object]:
    """What every kernel needs: the call, its sites, and which keys a query may see."""
    spec, residual = source.spec, residual_of(source.spec)
    tile_map = None if spec.mask is None or spec.mask.tiles is None else source.access("tile_map", spec.mask.tiles)
    return {
        "header": header(spec, plan), "plan": plan, "entry": ENTRY, "max_length": MAX_LENGTH,
        "lse_ctype": C_TYPES[lse_dtype(spec, "cpp")],
        "batch": spec.batch, "qk_dim": spec.qk_dim, "v_dim": spec.v_dim, "symbols": spec.symbols,
        "batch_sizes": [f"B{i}" for i in range(spec.batch)], "ranks": [o.rank for o in spec.operands],
        "query": source.access("query", spec.query), "key": source.access("key", spec.key),
        "value": source.access("value", spec.value), "out_ctype": C_TYPES[spec.out_dtype],
        "bounds": _bound_functions(source), "residual": residual is not None, "empty_row": spec.empty_row,
        "drawn": drawn_in(*spec.roots().values()),
        "tile_map": tile_map, "map_rows": tiles.ROWS, "map_keys": tiles.KEYS,
        "ranges": Ranges() if residual is None or tile_map is not None else ranges_of(residual, source.writer, source.count),
        "site": source.site, "rows": source.rows,
    }  # fmt: skip


def residual_of(spec: AttentionSpec) -> Expr | None:
    """What the mask asks for beside its bounds; None: nothing."""
    return None if spec.mask is None or spec.mask.residual is None or _true(spec.mask.residual) else spec.mask.residual


def _matrix_context(source: Source, visible: Expr, residual: Expr | None, threshold: float | None) -> dict[str, object]:
    """What ``forward_matrix.cpp.jinja`` needs besides; the lanes core stays in it, for rows that need more than bfloat16."""
    spec = source.spec
    runs = keys.KeyRuns()
    program = partial(keys.key_program, source.site, runs, source.count)
    programs = [program("ScoreFull", "Every entry is visible.", visible)]
    if spec.mask is not None:
        names = tuple(bound.name for bound in _bound_functions(source))
        programs.append(program("ScorePartial", "Some entries are masked.", visible, names, residual))
    weighted = not isinstance(peel(spec.weight)[0], Prob) or peel(spec.weight)[1] != 1.0
    if weighted:
        programs.append(program("Weight", "What the product with the values takes in place of the probability.", spec.weight))
    return {
        "key_programs": programs, "key_runs": runs.context(), "masked": spec.mask is not None, "weighted": weighted,
        "masked_below": repr(max(_MASKED_SCORE, threshold if spec.mask is not None and threshold is not None else -math.inf)),
        "extra_functions": [source.function(node) for node in spec.extra_logits],
    }  # fmt: skip


def _bound_functions(source: Source) -> list[Bound]:
    mask = source.spec.mask
    found = [] if mask is None else [("lower", mask.lower), ("upper", mask.upper)]
    return [Bound(name, source.function(node)) for name, node in found if node is not None]


def header(spec: AttentionSpec, plan: Plan) -> str:
    """What the kernel computes, from what, made by which versions, and how to run it alone."""
    return "\n".join(f"// {line}" for line in [*header_lines(spec), *origin(plan)])


def header_lines(spec: AttentionSpec) -> list[str]:
    logits = "".join(f", {x}" for x in spec.extra_logits)
    return [
        f"out = sum over k of w * value,  w = {spec.weight}",
        f"softmax over k of {spec.score}" + (f"  (joined by {logits[2:]})" if logits else ""),
        *([] if spec.mask is None else [f"visible where {spec.mask.predicate}"]),
        f"spec  {spec.to_json()}",
    ]


def origin(plan: Plan) -> list[str]:
    alone = "alone: c++ -std=c++17 -O3 -march=native -w -fopenmp -DFUSE_STANDALONE <this file> -o kernel && ./kernel [threads]"
    return [f"plan  {plan}", f"made by torch-fuse {_version()}, torch {torch.__version__}", alone]


@cache
def _version() -> str:
    try:
        return metadata.version("torch-fuse")
    except metadata.PackageNotFoundError:
        return "(source tree)"


@cache
def environment() -> jinja2.Environment:
    folder = Path(fuse.templates.__path__[0])
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
