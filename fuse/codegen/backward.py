"""The backward kernel of a spec as one C++ source: what ``fuse.gradient`` says, by ``templates/cpp/backward_*.jinja``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fuse import expr
from fuse.codegen.cpp import C_TYPES, Value, Writer, is_affine, is_separable, scalar_function
from fuse.codegen.example import example_of_gradients
from fuse.codegen.keys import KeyProgram, KeyRuns, KeyWriter, bound
from fuse.codegen.render import (
    Program,
    Source,
    call_context,
    environment,
    header_lines,
    origin,
    peel,
    residual_of,
    threshold_of,
)
from fuse.codegen.sinks import Sink, sinks
from fuse.expr import Const, Expr, Load, Prob, Score, const
from fuse.gradient import Gradient, gradient
from fuse.planner import Plan
from fuse.spec import AttentionSpec

# Bytes that the parts of all sites may keep until their sums are added to small gradients.
_SLICE_LIMIT = 2**30


_LOG2E = "R(1.44269504088896341)"
_COMMENTS = {
    "full": "Every entry is visible.", "partial": "Some entries are masked.",
    "exact": "Scores as eager rounds them, of every key.",
}  # fmt: skip
# A log-sum-exp below this has lost digits that the probabilities of its row need.
_IMPRECISE = -1000.0


# ------------------------------------------------------------------------------------------------------------ programs


@dataclass(frozen=True)
class Added:
    """What an entry adds to a sink; ``tiled``: a tile of entries at a time."""

    name: str
    kind: str
    text: str
    tiled: bool = False


@dataclass(frozen=True)
class Results:
    """Texts of what an entry gives: ``weight``; ``gate``, the probability's gradient; ``slope``, the raw score's."""

    weight: str
    gate: str
    slope: str
    terms: tuple[Added, ...]


@dataclass
class Entries(Program):
    """What happens to an entry, in lanes of queries: see ``backward_score.h.jinja``."""

    results: Results | None = None


@dataclass
class KeyEntries(KeyProgram):
    """The same in lanes of keys: see ``backward_keys.h.jinja``."""

    results: Results | None = None


@dataclass(frozen=True)
class _Programs:
    """Writes the programs of one source. ``scale`` is left out of every slope, and multiplied in the end."""

    source: Source
    of: Gradient
    scale: float
    runs: KeyRuns = field(default_factory=KeyRuns)

    def lanes(self, name: str, exact: bool = False, predicate: Expr | None = None) -> Entries:
        program = Entries(f"entries_{name}", _COMMENTS[name])
        writer = self.source.writer(program, exact)
        allowed = self.source.bounds() if predicate is not None else []
        program.results = self._write(writer, program.entry.lines, exact, allowed, predicate)
        return program

    def keys(self, name: str, predicate: Expr | None = None) -> KeyEntries:
        program = KeyEntries(f"Entries{name.title()}", _COMMENTS[name], "score")
        writer = KeyWriter(self.source.site, program, self.runs, self.source.count)
        mask = self.of.spec.mask
        names = [n for n in ("lower", "upper") if predicate is not None and mask is not None and getattr(mask, n) is not None]
        allowed = [bound(program, n) for n in names]
        program.results = self._write(writer, program.entry.lines, False, allowed, predicate)
        return program

    def _write(self, writer: Writer, lines: list[str], exact: bool, allowed: list[str], predicate: Expr | None) -> Results:
        of, mask = self.of, self.of.spec.mask
        visible = not exact and mask is not None
        score = mask.visible if visible and mask is not None else of.spec.score
        slope = of.visible if visible and of.visible is not None else of.score
        factors = [t.visible if visible and t.visible is not None else t.factor for t in of.terms]
        for leaf in expr.walk(score, slope, of.spec.weight, of.weight, *factors):
            if isinstance(leaf, Score):
                writer.leaves[leaf] = Value("score", "real", True)
            if isinstance(leaf, Prob):
                writer.leaves[leaf] = Value("prob", "real", True)
        if exact:
            lines.append(f"const VR weighed = exp2_lanes(({self._real(writer, score)} - lse) * {_LOG2E}) * norm.inverse[v];")
            lines.append("const VR prob = select(norm.chosen[v], weighed, VR{});")
        else:
            inner, factor = peel(score)
            value = self._real(writer, inner)
            lines.append(f"const VR unmasked = {self._probability(writer, value, factor)};")
            if predicate is not None and not _true(predicate):
                allowed = [*allowed, f"({writer.value(predicate).spread('bool')})"]
            masked = f"select({' & '.join(allowed)}, unmasked, VR{{}})" if allowed else "unmasked"
            lines.append(f"const VR prob = {masked};")
        writer.exact = False
        gate = "d_weight" if is_one(of.weight) else f"{self._real(writer, of.weight)} * d_weight"
        weight = self._real(writer, of.spec.weight)
        return Results(weight, gate, self._slope(writer, slope, exact), tuple(self._terms(writer, factors)))

    @staticmethod
    def _probability(writer: Writer, score: str, factor: float) -> str:
        """Lanes of keys are rounded to bfloat16, and their rows have ``lse`` in base 2."""
        if isinstance(writer, KeyWriter):
            return f"exp2_near({score} * (R({factor!r}) * {_LOG2E}) - lse)"
        return f"exp2_lanes(({score} * R({factor!r}) - lse) * {_LOG2E}) * norm.inverse[v]"

    def _terms(self, writer: Writer, factors: Sequence[Expr]) -> Iterator[Added]:
        found = [s for s in sinks(self.of.spec, self.of.wanted) if s.kind != "matrix"]
        for sink, term, factor in zip(found, self.of.terms, factors, strict=True):
            if sink.kind != "logit":
                outer = "d_weight" if term.root == "weight" else "d_score"
                text = outer if is_one(factor) else f"{outer} * {self._real(writer, factor)}"
                yield Added(sink.name, sink.kind, text, _tiled(sink))

    def _slope(self, writer: Writer, slope: Expr, exact: bool) -> str:
        """Where nothing depends on the raw score, its gradient is zero even in a row of NaN."""
        if exact:
            text = self._real(writer, slope)
            return f"select({text} == R(0), VR{{}}, d_score * {text} * R({1 / self.scale!r}))"
        inner = peel_slope(slope)[0]
        return "d_score" if is_one(inner) else f"d_score * {self._real(writer, inner)}"

    @staticmethod
    def _real(writer: Writer, node: Expr) -> str:
        return writer.value(node).spread("real")


def _tiled(sink: Sink) -> bool:
    """Whether entries add at a part of the query plus a part of the key."""
    return sink.kind in ("dense", "entry") and (is_separable(sink.load) or all(is_affine(c) for c in sink.load.coords))


def _true(node: Expr) -> bool:
    return isinstance(node, Const) and node.value is True


def is_one(node: Expr) -> bool:
    return isinstance(node, Const) and node.value == 1


def peel_slope(node: Expr) -> tuple[Expr, float]:
    """(inner, c) with node = c * inner, c > 0: as ``peel``, and what is the same for all entries is one."""
    inner, factor = peel(node)
    if isinstance(inner, Const) and 1e-30 < inner.value < 1e30:
        return const(1.0, inner.dtype), factor * inner.value
    return inner, factor


# -------------------------------------------------------------------------------------------------------------- source


def render_backward(spec: AttentionSpec, wanted: Sequence[bool], plan: Plan) -> str:
    """One self-contained C++ source. Raises Unsupported where a gradient cannot be computed without a risk."""
    of, found = gradient(spec, tuple(wanted)), sinks(spec, wanted)
    source = Source(spec)
    mask, residual = spec.mask, residual_of(spec)
    scale = peel_slope(of.score if of.visible is None else of.visible)[1]
    write = _Programs(source, of, scale)
    predicates = [] if mask is None else [residual if residual is not None else const(True, "bool")]
    exact = exact_below(spec)
    programs: list[Program] = []
    if exact is not None:
        programs = [write.lanes("exact", exact=True), source.program("scores_exact", "Scores only.", spec.score, exact=True)]
    key_programs: list[KeyEntries] = []
    if plan.core == "matrix":
        key_programs = [write.keys("full"), *(write.keys("partial", p) for p in predicates)]
    else:
        programs += [write.lanes("full"), *(write.lanes("partial", predicate=p) for p in predicates)]
    matrices = {s.name for s in found if s.kind == "matrix"}
    entries = any(s.kind in ("dense", "row", "key", "entry") for s in found)
    names = ", ".join(s.name if s.kind == "matrix" else str(s.load) for s in found)
    lines = (f"gradients of {names}, as fuse.gradient has them, of", *header_lines(spec), *origin(plan))
    context = call_context(source, plan) | {
        "header": "\n".join(f"// {line}" for line in lines),
        "programs": [p for p in programs if isinstance(p, Entries)], "key_programs": key_programs,
        "key_runs": write.runs.context(), "masked": mask is not None, "exact": exact is not None, "threshold": exact,
        "exact_scores": next((p for p in programs if not isinstance(p, Entries)), None),
        "extra_logits": source.extra_logits(), "wanted": matrices, "factor": repr(scale),
        "sinks": [_sink_context(source, of, i, s) for i, s in enumerate(found)],
        "example": example_of_gradients(
            spec, [(s.load.operand, C_TYPES[s.load.dtype] if s.kind == "matrix" else "R", s.order) for s in found]
        ),
        "needs_scores": bool(matrices & {"query", "key"}) or entries, "slice_limit": _SLICE_LIMIT,
        "slices": any(s.kind in ("row", "key", "entry", "logit") for s in found), "argument_count": argument_count(spec),
        "stage_count": max((len(p.stages) for p in programs), default=0) + sum(map(_tiled, found)),
    }  # fmt: skip
    return environment().get_template(f"cpp/backward_{plan.core}.cpp.jinja").render(context)


def argument_count(spec: AttentionSpec) -> int:
    """The length of a forward call's array of arguments."""
    return 3 + spec.batch + 2 + len(spec.symbols) + sum(1 + 2 * o.rank for o in spec.operands)


def exact_below(spec: AttentionSpec) -> str | None:
    """Rows of no larger log-sum-exp are normalised again from every score; None where there is no such row."""
    maskable = spec.mask is not None or any(
        isinstance(n, Load) or (isinstance(n, Const) and n.dtype in expr.FLOATS and abs(n.value) >= -_IMPRECISE)
        for n in expr.walk(spec.score)
    )
    return repr(max(_IMPRECISE, threshold_of(spec) or -math.inf)) if maskable else None


def _sink_context(source: Source, of: Gradient, number: int, sink: Sink) -> dict[str, object]:
    def place(dims: Iterable[int] | None) -> str:
        return scalar_function(lambda w: w.offset(sink.load, strides=f"t.stride[{number}]", dims=dims), source.count)

    found = {"name": sink.name, "kind": sink.kind, "number": number, "rank": len(sink.load.coords)}
    found["matrix"] = sink.kind == "matrix"
    if sink.kind == "matrix":
        row, column = ("q" if sink.name == "query" else "k"), ("e" if sink.name == "value" else "d")
        return found | {"row": row, "column": column, "ctype": C_TYPES[sink.load.dtype], "place": place(None), "sliced": False}
    inner = tuple(d for d, c in enumerate(sink.load.coords) if expr.axes(c) & {"q", "k"})
    size = " * ".join(f"c.size[{sink.load.operand}][{d}]" for d in sink.dims) or "1"
    outer = tuple(d for d in range(len(sink.load.coords)) if d not in inner)
    found |= {"comment": f"Gradient of {sink.load}.", "base": place(outer), "place": place(inner), "size": size,
              "sliced": sink.kind != "dense", "inside": ""}  # fmt: skip
    if _tiled(sink):
        always = is_separable(sink.load)
        found["inside"] = scalar_function(lambda w: "true" if always else w.inside(sink.load), source.count)
    if sink.kind == "logit":
        term = of.terms[int(sink.name.removeprefix("term"))]
        logit = of.spec.extra_logits[int(term.root.rpartition(".")[2])]
        found |= {"logit": source.function(logit), "factor": source.function(term.factor)}
    return found
