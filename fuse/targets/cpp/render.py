"""A spec and a plan as one C++ source, by the templates of ``templates/cpp``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

from fuse.ir import expr
from fuse.ir.expr import Expr, Load, Prob, Score
from fuse.ir.interval import MAX_LENGTH
from fuse.ir.philox import drawn_in
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import KEYS, ROWS
from fuse.kernel.example import example
from fuse.kernel.forward import forward_program
from fuse.kernel.source import ENTRY, alone_lines, environment, header_lines, made_by
from fuse.targets.cpp import write_keys
from fuse.targets.cpp.outline import finished
from fuse.targets.cpp.plan import Plan, lse_dtype
from fuse.targets.cpp.ranges import ranges_of
from fuse.targets.cpp.write import C_TYPES, Body, CppValue, Draw, Stage, Writer, scalar_function

# Additive masks hold -1e4 or less: a score below this does not tell how large the visible ones of its row will be.
_MASKED_SCORE = -9000.0


@dataclass
class QueryProgram:
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


class CppSource:
    """Collects the pieces of one source; members shared by all programs live in ``batch_index`` and ``rows``."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec, self.computed = spec, forward_program(spec)
        self.count = [0]
        self.hidden = "vr(-R(INFINITY))" if spec.softmax else "VR{}"  # the score of an entry that is not seen
        self.batch_index = Body(prefix="b.")
        self.rows = Body(lanes=True, prefix="r.", suffix="[v]")

    def function(self, node: Expr) -> str:
        return scalar_function(lambda w: w.value(node).text, self.count)

    def access(self, name: str, load: Load) -> Access:
        return Access(name, C_TYPES[load.dtype], load.operand, scalar_function(lambda w: w.offset(load), self.count))

    def writer(self, program: QueryProgram | None = None, as_eager: bool = False) -> Writer:
        def place(axes: frozenset[str]) -> Body:
            varying = axes & {"q", "k"}
            if program is None or varying <= {"q"}:
                return self.rows if varying else self.batch_index
            return program.key if varying == {"k"} else program.entry

        stages: list[Stage | Draw] = [] if program is None else program.stages
        return Writer(place, as_eager, stages, {}, self.count)

    def program(self, name: str, comment: str, node: Expr, as_eager: bool = False, masked: bool = False) -> QueryProgram:
        """The score ``node`` of every entry; ``masked``: what vanishes where the mask hides it."""
        program = QueryProgram(name, comment)
        writer = self.writer(program, as_eager)
        for leaf in expr.walk(node):
            if isinstance(leaf, Score):
                writer.leaves[leaf] = CppValue("score", "real", True)
        program.result = writer.value(node).spread("real")
        if masked:
            allowed = " & ".join(self.seen(writer))
            program.entry.lines.append(f"const VR visible = select({allowed}, {program.result}, {self.hidden});")
            program.result = "visible"
        return program

    def seen(self, writer: Writer) -> list[str]:
        """What must hold for an entry to be visible: a key inside the mask's bounds, and the residual."""
        residual = self.computed.residual
        of_entry = [] if residual is None else [f"({writer.value(residual).spread('bool')})"]
        return [*(f"(vi(k) {'>=' if b.name == 'lower' else '<'} r.{b.name}[v])" for b in self.computed.bounds), *of_entry]

    def weight(self) -> QueryProgram:
        program = QueryProgram("weigh", "")
        writer = self.writer(program)
        for leaf in expr.walk(self.spec.weight):
            if isinstance(leaf, Prob):
                writer.leaves[leaf] = CppValue("prob", "real", True)
        program.result = writer.value(self.spec.weight).spread("real")
        return program

    def extra_logits(self) -> list[str]:
        return [self.writer().value(node).spread("real") for node in self.spec.extra_logits]


def render(spec: AttentionSpec, plan: Plan) -> str:
    """One self-contained C++ source with the entry point ``ENTRY(const int64_t* arguments)``."""
    source = CppSource(spec)
    computed = source.computed
    programs = [source.program("score_full", "Every entry is visible.", computed.visible)]
    if computed.masked:
        programs.append(source.program("score_partial", "Some entries are masked.", computed.visible, masked=True))
    if computed.threshold is not None:
        programs.append(source.program("score_exact", "As eager rounds, over every key.", spec.score, as_eager=True))
    weight = source.weight()
    extra_logits = source.extra_logits()
    context = call_context(source, plan) | {
        "programs": programs, "weight": weight, "extra_logits": extra_logits, "recomputed": computed.threshold is not None,
        "threshold": repr(computed.threshold), "factor": repr(computed.factor),
        "stage_count": max(len(p.stages) for p in [*programs, weight]), "example": example(spec),
    }  # fmt: skip
    if plan.core == "matrix":
        context |= _matrix_context(source)
    text = environment().get_template(f"cpp/{plan.core}/forward.cpp.jinja").render(context)
    return finished(text, header(spec, plan), spec)


def call_context(source: CppSource, plan: Plan) -> dict[str, object]:
    """What every kernel needs: the call, its batch indices, and which keys a query may see."""
    spec, residual = source.spec, source.computed.residual
    tile_map = None if spec.mask is None or spec.mask.tiles is None else source.access("tile_map", spec.mask.tiles)
    return {
        "header": header(spec, plan), "plan": plan, "entry": ENTRY, "ctypes": C_TYPES | {"real": "R"}, "max_length": MAX_LENGTH,
        "lse_ctype": C_TYPES[lse_dtype(spec)],
        "batch": spec.batch, "qk_dim": spec.qk_dim, "v_dim": spec.v_dim, "symbols": spec.symbols,
        "batch_sizes": [f"B{i}" for i in range(spec.batch)], "ranks": [o.rank for o in spec.operands],
        "query": source.access("query", spec.query), "key": source.access("key", spec.key),
        "value": source.access("value", spec.value), "out_ctype": C_TYPES[spec.out_dtype],
        "bounds": [{"name": b.name, "text": source.function(b.node)} for b in source.computed.bounds],
        "masked": source.computed.masked, "residual": residual is not None, "empty_row": spec.empty_row,
        "normalisation": spec.normalisation, "softmax": spec.softmax,
        "drawn": drawn_in(*spec.roots().values()),
        "tile_map": tile_map, "map_rows": ROWS, "map_keys": KEYS,
        "ranges": ranges_of(None if tile_map is not None else residual, source.writer, source.count),
        "batch_index": source.batch_index, "rows": source.rows,
    }  # fmt: skip


def _matrix_context(source: CppSource) -> dict[str, object]:
    """What ``matrix/forward.cpp.jinja`` needs besides; the lanes core stays in it, for rows that need more than bfloat16."""
    spec, computed = source.spec, source.computed
    runs = write_keys.KeyRuns()
    program = partial(write_keys.key_program, source.batch_index, runs, source.count)
    programs = [program("ScoreFull", "Every entry is visible.", computed.visible)]
    if computed.masked:
        names = tuple(bound.name for bound in computed.bounds)
        masked = program("ScorePartial", "Some entries are masked.", computed.visible, names, computed.residual, source.hidden)
        programs.append(masked)
    if computed.weighted:
        programs.append(program("Weight", "What the product with the values takes in place of the probability.", spec.weight))
    below = computed.threshold if computed.masked and computed.threshold is not None else -math.inf
    return {
        "key_programs": programs, "key_runs": runs.context(), "weighted": computed.weighted,
        "masked_below": repr(max(_MASKED_SCORE, below)),
        "extra_functions": [source.function(node) for node in spec.extra_logits],
    }  # fmt: skip


def header(spec: AttentionSpec, plan: Plan) -> str:
    """What the kernel computes, from what, made by which versions, and how to run it alone."""
    return "\n".join(f"// {line}" for line in [*header_lines(spec), *origin(plan)])


def origin(plan: Plan) -> list[str]:
    build = "c++ -std=c++17 -O3 -march=native -w -fopenmp -DFUSE_STANDALONE <this file> -o kernel && ./kernel [threads]"
    return [f"plan  {plan}", made_by(), *alone_lines(build)]
