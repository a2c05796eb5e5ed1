"""The backward kernel of a spec as one C++ source: what ``fuse.ir.gradient`` says, by ``templates/cpp``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fuse.ir import expr
from fuse.ir.expr import Expr, Prob, Score
from fuse.ir.gradient import Gradient
from fuse.ir.spec import AttentionSpec
from fuse.kernel.addressing import is_affine, is_separable
from fuse.kernel.backward import Added, BackwardProgram, Results, backward_program, is_one, recomputed_above
from fuse.kernel.destinations import Destination
from fuse.kernel.example import example_of_gradients
from fuse.kernel.source import environment, header_lines
from fuse.targets.cpp.outline import finished
from fuse.targets.cpp.plan import Plan, lse_dtype
from fuse.targets.cpp.render import CppSource, QueryProgram, call_context, origin
from fuse.targets.cpp.write import C_TYPES, CppValue, Writer, scalar_function
from fuse.targets.cpp.write_keys import KeyProgram, KeyRuns, KeyWriter, bound

# Bytes that the parts of all batch indices may keep until their sums are added to small gradients.
_SLICE_LIMIT = 2**30


_LOG2E = "R(1.44269504088896341)"
_COMMENTS = {
    "full": "Every entry is visible.", "partial": "Some entries are masked.",
    "exact": "Rows that are normalised again, from every key.",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ programs


@dataclass
class QueryEntries(QueryProgram):
    """What happens to an entry, in lanes of queries: see ``lanes/backward_score.h.jinja``."""

    results: Results | None = None


@dataclass
class KeyEntries(KeyProgram):
    """The same in lanes of keys: see ``matrix/backward_keys.h.jinja``."""

    results: Results | None = None


@dataclass(frozen=True)
class _Programs:
    """Writes the programs of one source."""

    source: CppSource
    computed: BackwardProgram
    runs: KeyRuns = field(default_factory=KeyRuns)

    def lanes(self, name: str) -> QueryEntries:
        program = QueryEntries(f"entries_{name}", _COMMENTS[name])
        writer = self.source.writer(program, as_eager=name == "exact" and self.computed.as_eager)
        seen = partial(self.source.seen, writer) if name == "partial" else list
        program.results = self._write(writer, program.entry.lines, seen, exact=name == "exact")
        return program

    def keys(self, name: str) -> KeyEntries:
        program = KeyEntries(f"Entries{name.title()}", _COMMENTS[name], "score")
        writer = KeyWriter(self.source.batch_index, program, self.runs, self.source.count)
        forward = self.computed.forward
        bounds = [bound(program, b.name) for b in forward.bounds] if name == "partial" else []

        def seen() -> list[str]:
            residual = forward.residual if name == "partial" else None
            return [*bounds, *([] if residual is None else [f"({writer.value(residual).spread('bool')})"])]

        program.results = self._write(writer, program.entry.lines, seen)
        return program

    def _write(self, writer: Writer, lines: list[str], seen: Callable[[], list[str]], exact: bool = False) -> Results:
        """``seen`` writes what must hold for an entry to be visible, after its score; ``exact``: of rows normalised again."""
        of, forward = self.computed.of, self.computed.forward
        score = of.spec.score if exact else forward.visible
        slope = of.score if exact else self.computed.slope
        factors = [t.factor for t in of.terms] if exact else self.computed.factors
        for leaf in expr.walk(score, slope, of.spec.weight, of.weight, *factors):
            if isinstance(leaf, Score):
                writer.leaves[leaf] = CppValue("score", "real", True)
            if isinstance(leaf, Prob):
                writer.leaves[leaf] = CppValue("prob", "real", True)
        if exact:
            lines.append(f"const VR weighed = exp2_lanes(({self._real(writer, score)} - lse) * {_LOG2E}) * norm.inverse[v];")
            lines.append("const VR prob = select(norm.chosen[v], weighed, VR{});")
        else:
            value = self._real(writer, score)
            lines.append(f"const VR unmasked = {self._probability(writer, value, forward.factor)};")
            allowed = " & ".join(seen())
            lines += [f"const auto seen = {allowed};"] if allowed else []
            lines.append(f"const VR prob = {_where_seen('unmasked', allowed)};")
        writer.as_eager = False
        gate = "d_weight" if is_one(of.weight) else f"{self._real(writer, of.weight)} * d_weight"
        weight = self._real(writer, of.spec.weight)
        if of.spec.softmax:
            return Results(weight, "prob", gate, self._slope(writer, slope, exact), tuple(self._terms(writer, factors)))
        # Elsewhere nothing else makes what is derived there vanish, be it infinite.
        terms = [replace(t, text=_where_seen(t.text, allowed)) for t in self._terms(writer, factors)]
        slope_seen = _where_seen(self._slope(writer, slope, exact), allowed)
        return Results(weight, self._inverse(writer), gate, slope_seen, tuple(terms))

    def _probability(self, writer: Writer, score: str, factor: float) -> str:
        """Lanes of keys are rounded to bfloat16, and their rows have ``lse`` in base 2."""
        if not self.computed.spec.softmax:
            return f"{score} * R({factor!r}) * {self._inverse(writer)}"
        if isinstance(writer, KeyWriter):
            return f"exp2_near({score} * (R({factor!r}) * {_LOG2E}) - lse)"
        return f"exp2_lanes(({score} * R({factor!r}) - lse) * {_LOG2E}) * norm.inverse[v]"

    @staticmethod
    def _inverse(writer: Writer) -> str:
        return "inverse" if isinstance(writer, KeyWriter) else "norm.inverse[v]"

    def _terms(self, writer: Writer, factors: Sequence[Expr]) -> Iterator[Added]:
        found = [s for s in self.computed.destinations if s.kind != "matrix"]
        for to, term, factor in zip(found, self.computed.of.terms, factors, strict=True):
            if to.kind != "logit":
                outer = "d_weight" if term.root == "weight" else "d_score"
                text = outer if is_one(factor) else f"{outer} * {self._real(writer, factor)}"
                yield Added(to.name, to.kind, text, _tiled(to))

    def _slope(self, writer: Writer, slope: Expr, exact: bool) -> str:
        """Where nothing depends on the raw score, its gradient is zero even in a row of NaN."""
        if exact:
            text = self._real(writer, slope)
            return f"select({text} == R(0), VR{{}}, d_score * {text} * R({1 / self.computed.scale!r}))"
        return "d_score" if is_one(slope) else f"d_score * {self._real(writer, slope)}"

    @staticmethod
    def _real(writer: Writer, node: Expr) -> str:
        return writer.value(node).spread("real")


def _where_seen(text: str, allowed: str) -> str:
    return f"select(seen, {text}, VR{{}})" if allowed else text


def _tiled(to: Destination) -> bool:
    """Whether entries add at a part of the query plus a part of the key."""
    return to.kind in ("dense", "entry") and (is_separable(to.load) or all(is_affine(c) for c in to.load.coords))


# -------------------------------------------------------------------------------------------------------------- source


def render_backward(spec: AttentionSpec, wanted: Sequence[bool], plan: Plan) -> str:
    """One self-contained C++ source. Raises Unsupported where a gradient cannot be computed without a risk."""
    computed = backward_program(spec, tuple(wanted))
    found, masked = computed.destinations, computed.forward.masked
    source = CppSource(spec)
    write = _Programs(source, computed)
    names = ("full", "partial") if masked else ("full",)
    programs: list[QueryProgram] = []
    if computed.recomputed_below is not None:
        scores = source.program("scores_exact", "Scores only.", spec.score, as_eager=computed.as_eager)
        programs = [write.lanes("exact"), scores]
    key_programs: list[KeyEntries] = []
    if plan.core == "matrix":
        key_programs = [write.keys(name) for name in names]
    else:
        programs += [write.lanes(name) for name in names]
    matrices = {s.name for s in found if s.kind == "matrix"}
    entries = any(s.kind in ("dense", "row", "key", "entry") for s in found)
    read = ", ".join(s.name if s.kind == "matrix" else str(s.load) for s in found)
    asked = f"wanted  {json.dumps(list(wanted))}"
    lines = (f"gradients of {read}, as fuse.ir.gradient has them, of", *header_lines(spec), asked, *origin(plan))
    header = "\n".join(f"// {line}" for line in lines)
    context = call_context(source, plan) | {
        "header": header,
        "programs": [p for p in programs if isinstance(p, QueryEntries)], "key_programs": key_programs,
        "key_runs": write.runs.context(), "recomputed": computed.recomputed_below is not None,
        "recomputed_below": repr(computed.recomputed_below), "recomputed_above": repr(recomputed_above(lse_dtype(spec))),
        "recomputed_scores": next((p for p in programs if not isinstance(p, QueryEntries)), None),
        "extra_logits": source.extra_logits(), "wanted": matrices, "factor": repr(computed.scale),
        "destinations": [_destination_context(source, computed.of, i, s) for i, s in enumerate(found)],
        "example": example_of_gradients(
            spec, [(s.load.operand, s.load.dtype if s.kind == "matrix" else "real", s.order) for s in found]
        ),
        "needs_scores": bool(matrices & {"query", "key"}) or entries, "slice_limit": _SLICE_LIMIT,
        "split": spec.out_dtype == "float32",
        "slices": any(s.kind in ("row", "key", "entry", "logit") for s in found), "argument_count": argument_count(spec),
        "stage_count": max((len(p.stages) for p in programs), default=0) + sum(map(_tiled, found)),
    }  # fmt: skip
    text = environment().get_template(f"cpp/{plan.core}/backward.cpp.jinja").render(context)
    return finished(text, header, spec)


def argument_count(spec: AttentionSpec) -> int:
    """The length of a forward call's array of arguments."""
    return 3 + spec.batch + 2 + len(spec.symbols) + sum(1 + 2 * o.rank for o in spec.operands)


def _destination_context(source: CppSource, of: Gradient, number: int, to: Destination) -> dict[str, object]:
    def place(dims: Iterable[int] | None) -> str:
        return scalar_function(lambda w: w.offset(to.load, strides=f"t.stride[{number}]", dims=dims), source.count)

    found = {"name": to.name, "kind": to.kind, "number": number, "rank": len(to.load.coords)}
    found["matrix"] = to.kind == "matrix"
    if to.kind == "matrix":
        row, column = ("q" if to.name == "query" else "k"), ("e" if to.name == "value" else "d")
        return found | {"row": row, "column": column, "ctype": C_TYPES[to.load.dtype], "place": place(None), "sliced": False}
    inner = tuple(d for d, c in enumerate(to.load.coords) if expr.axes(c) & {"q", "k"})
    size = " * ".join(f"c.size[{to.load.operand}][{d}]" for d in to.dims) or "1"
    outer = tuple(d for d in range(len(to.load.coords)) if d not in inner)
    found |= {"comment": f"Gradient of {to.load}.", "base": place(outer), "place": place(inner), "size": size,
              "sliced": to.kind != "dense", "inside": ""}  # fmt: skip
    if _tiled(to):
        always = is_separable(to.load)
        found["inside"] = scalar_function(lambda w: "true" if always else w.inside(to.load), source.count)
    if to.kind == "logit":
        term = of.terms[int(to.name.removeprefix("term"))]
        logit = of.spec.extra_logits[int(term.root.rpartition(".")[2])]
        found |= {"logit": source.function(logit), "factor": source.function(term.factor)}
    return found
