"""A spec and a plan as one Triton module, by the templates of ``templates/triton``."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuse import expr
from fuse.codegen.cpp import HALVES
from fuse.codegen.render import ENTRY, environment, header_lines, peel, threshold_of
from fuse.codegen.triton import Block, TritonWriter
from fuse.expr import Expr, Load, Prob, Score, const
from fuse.planner_triton import TritonPlan
from fuse.spec import AttentionSpec

_LOG2_E = 1.4426950408889634


@dataclass
class Program:
    """One score program of a tile. ``seen``: texts of what must hold for an entry to count."""

    lines: list[str] = field(default_factory=list)
    result: str = ""
    unit: str = ""
    seen: list[str] = field(default_factory=list)


class Source:
    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.count = [0]
        self.site, self.rows = Block(), Block()
        self.double = spec.lse_dtype == "float64"
        self.real = "tl.float64" if self.double else "tl.float32"

    def writer(self, tile: Block | None = None, exact: bool = False) -> TritonWriter:
        def place(axes: frozenset[str]) -> Block:
            varying = axes & {"q", "k"}
            return self.site if not varying else self.rows if varying == {"q"} or tile is None else tile

        return TritonWriter(place, self.real, self.count, exact)

    def program(
        self, node: Expr, factor: float, seen: list[str], exact: bool = False, predicate: Expr | None = None
    ) -> Program:
        tile = Block()
        writer = self.writer(tile, exact)
        for leaf in expr.walk(node):
            if isinstance(leaf, Score):
                rounded = exact and leaf.dtype in HALVES
                writer.leaves[leaf] = f"tl.cast(tl.cast(raw, tl.{leaf.dtype}), {self.real})" if rounded else "raw"
        result = writer.value(node)
        conditions = [*seen, *([] if predicate is None else [writer.value(predicate)])]
        return Program(tile.lines, result, repr(factor * _LOG2_E), conditions)

    def weight(self) -> Program:
        tile = Block()
        writer = self.writer(tile)
        writer.leaves |= {leaf: "prob" for leaf in expr.walk(self.spec.weight) if isinstance(leaf, Prob)}
        return Program(result=writer.value(self.spec.weight), lines=tile.lines)

    def matrix(self, load: Load, names: dict[str, str] | None = None) -> Program:
        """A tile of query, key or value: in its own dtype, as tensor cores take it, where all three have the same."""
        dtypes = {x.dtype for x in (self.spec.query, self.spec.key, self.spec.value)}
        here = Block()
        writer = TritonWriter(lambda axes: here if axes else self.site, self.real, self.count, names=names or {})
        return Program(here.lines, writer.load(load, cast=len(dtypes) > 1))

    def bound(self, name: str, node: Expr) -> dict[str, object]:
        found: dict[str, object] = {"name": name}
        for at in ("q0", "q1"):
            block = Block()
            writer = TritonWriter(lambda axes, block=block: block if "q" in axes else self.site, self.real, self.count)  # type: ignore[misc]
            writer.names["q"] = at
            found[at] = Program(block.lines, writer.value(node))
        return found

    def extra(self, node: Expr) -> str:
        text = self.writer().value(node)
        return f"tl.reshape({text}, [BM])" if "q" in expr.axes(node) else text


def render_triton(spec: AttentionSpec, plan: TritonPlan) -> str:
    """One Python module with the kernel ENTRY; its arguments are those of ``fuse.runtime.triton``."""
    source, mask = Source(spec), spec.mask
    visible, factor = peel(spec.score if mask is None else mask.visible)
    residual = None if mask is None or mask.residual is None or mask.residual == const(True, "bool") else mask.residual
    named = [] if mask is None else [("lower", mask.lower), ("upper", mask.upper)]
    bounds = [source.bound(name, node) for name, node in named if node is not None]
    masked = bool(bounds) or residual is not None
    threshold = threshold_of(spec)
    seen = ["k_ok", *(text for name, node in named if node is not None for text in [_within(source, name, node)])]
    skip = Block()
    context = {
        "header": "\n".join(f"# {line}" for line in [*header_lines(spec), f"plan  {plan}"]), "entry": ENTRY,
        "batch": spec.batch, "qk_dim": spec.qk_dim, "v_dim": spec.v_dim, "symbols": spec.symbols, "real": source.real,
        "double": source.double, "width": plan.width, "v_width": plan.v_width, "bounds": bounds,
        "residual": residual is not None,
        "query": source.matrix(spec.query), "key": source.matrix(spec.key), "value": source.matrix(spec.value, {"k": "row"}),
        "full": source.program(visible, factor, [] if masked else ["k_ok"]),
        "partial": source.program(visible, factor, seen, predicate=residual) if masked else None,
        "exact": None if threshold is None else source.program(spec.score, 1.0, ["k_ok"], exact=True),
        "skip": Program(skip.lines, _seen(source, skip, seen, residual)),
        "weight": source.weight(), "extras": [source.extra(x) for x in spec.extra_logits], "factor": repr(factor),
        "threshold": repr(threshold), "empty_row": spec.empty_row, "site": source.site, "rows": source.rows,
        "pointers": [f"p{i}" for i in range(len(spec.operands))],
        "strides": [f"{x}{i}_{d}" for i, o in enumerate(spec.operands) for x in "ns" for d in range(o.rank)],
        "out_strides": [f"to_{i}" for i in range(spec.batch + 2)], "out_offset": _out_offset(spec),
    }  # fmt: skip
    return environment().get_template("triton/forward.py.jinja").render(context)


def _within(source: Source, name: str, node: Expr) -> str:
    return f"(k {'>=' if name == 'lower' else '<'} {source.writer().value(node)})"


def _seen(source: Source, tile: Block, seen: list[str], residual: Expr | None) -> str:
    conditions = [*seen, "q_ok"] if residual is None else [*seen, "q_ok", source.writer(tile).value(residual)]
    return " & ".join(conditions)


def _out_offset(spec: AttentionSpec) -> str:
    names = [*(f"b{i}" for i in range(spec.batch)), "q", "e"]
    return " + ".join(f"tl.cast({name}, tl.int64) * to_{i}" for i, name in enumerate(names))
