"""A spec and a plan as one Triton module, by the templates of ``templates/triton``."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuse.ir import expr
from fuse.ir.expr import HALVES, Const, Expr, Index, Load, Prob, Score, apply, const, symbol
from fuse.ir.spec import AttentionSpec
from fuse.kernel.forward import Bound, forward_program
from fuse.kernel.rectangles import rows_of
from fuse.kernel.source import ENTRY, header_lines
from fuse.targets.triton.arguments import Arguments, strides
from fuse.targets.triton.outline import rendered
from fuse.targets.triton.plan import TritonPlan, widened
from fuse.targets.triton.walk import Limit, Walk
from fuse.targets.triton.write import Block, TritonWriter, fits_a_word

_LOG2_E = 1.4426950408889634
# Numbers above this may be added to scores to mask them.
_ORDINARY = 1e3
# By a bound of keys: which ends of a walk its values for the first and the last query of a block are.
ENDS = {"lower": {"q0": "begin", "q1": "full_begin"}, "upper": {"q0": "full_end", "q1": "end"}}


@dataclass
class TileProgram:
    """One score program of a tile.

    unit   what turns its scores into powers of two, or into weights where there is no softmax
    power  that of an entry, less that of the largest score
    seen   texts of what must hold for an entry to count
    """

    lines: list[str] = field(default_factory=list)
    result: str = ""
    unit: str = ""
    power: str = ""
    seen: list[str] = field(default_factory=list)


@dataclass
class Stream:
    """Tiles of keys or values: ``before`` the loop over tiles, ``lines`` of a tile, and its text; ``inside``, where all of its
    keys are there; ``copied``, by its tensor descriptor, if there may be one."""

    before: list[str]
    lines: list[str]
    result: str
    inside: str
    copied: str


class TritonSource:
    """Collects the pieces of one source.

    row_axes   loop indices that differ between the rows that a program owns
    described  tiles of query, key and value may be copied by tensor descriptors
    """

    def __init__(self, spec: AttentionSpec, row_axes: frozenset[str] = frozenset({"q"}), described: bool = False) -> None:
        self.spec, self.computed, self.described = spec, forward_program(spec), described
        self.row_axes = row_axes
        self.count = [0]
        self.per_batch, self.per_row = Block(), Block()
        self.double = spec.lse_dtype == "float64"
        self.real = "tl.float64" if self.double else "tl.float32"

    def writer(self, tile: Block | None = None, as_eager: bool = False) -> TritonWriter:
        def place(axes: frozenset[str]) -> Block:
            varying = axes & (self.row_axes | {"q", "k"})
            return self.per_batch if not varying else self.per_row if varying <= self.row_axes or tile is None else tile

        # Tiles of the forward kernel begin at multiples of their size, those of parts of the keys anywhere.
        drawn = "f_uniform_along({}, k0, BN)" if self.row_axes == {"q"} else ""
        return TritonWriter(place, self.real, self.count, as_eager, drawn=drawn)

    def program(
        self, node: Expr, factor: float, seen: list[str], as_eager: bool = False, predicate: Expr | None = None
    ) -> TileProgram:
        tile = Block()
        writer = self.writer(tile, as_eager)
        for leaf in expr.walk(node):
            if isinstance(leaf, Score):
                rounded = as_eager and leaf.dtype in HALVES
                writer.leaves[leaf] = f"tl.cast(tl.cast(raw, tl.{leaf.dtype}), {self.real})" if rounded else "raw"
        result = writer.value(node)
        conditions = [*seen, *([] if predicate is None else [writer.value(predicate)])]
        unit = repr(factor * _LOG2_E if self.spec.softmax else factor)
        power = f"score * {unit} - (reference * {unit})[:, None]"  # one instruction
        if as_eager or _may_be_huge(node):
            power = f"(score - reference[:, None]) * {unit}"
        return TileProgram(tile.lines, result, unit, power, conditions)

    def weight(self) -> TileProgram:
        tile = Block()
        writer = self.writer(tile)
        writer.leaves |= {leaf: "prob" for leaf in expr.walk(self.spec.weight) if isinstance(leaf, Prob)}
        return TileProgram(tile.lines, writer.value(self.spec.weight))

    def matrix(self, load: Load) -> TileProgram:
        """The queries' features: in their own dtype, as tensor cores take it, where query, key and value have the same."""
        here = Block()
        writer = TritonWriter(lambda axes: here if axes else self.per_batch, self.real, self.count)
        pointer, size = f"p{load.operand} + {writer.offset(load)}", f"BM, {widened(self.spec.qk_dim)}"
        return TileProgram(here.lines, writer.tile(load, pointer, size, ["d_ok", "q_ok"], cast=self._mixed()))

    def stream(self, name: str, load: Load, full: bool, ahead: bool) -> Stream:
        """Tiles of "key", whose positions ``k`` are a row, or of "value", whose positions ``row`` are a column.

        full   every feature of the tile is there
        ahead  addresses are computed before the loop, which takes registers
        """
        width = widened(self.spec.v_dim if name == "value" else self.spec.qk_dim)
        column, feature, size = ("row", "e", f"BN, {width}") if name == "value" else ("k", "d", f"{width}, BN")
        before, tile = Block(), Block()
        moved = [dim for dim, coord in enumerate(load.coords) if "k" in expr.axes(coord)]
        (dim,) = moved if ahead and len(moved) == 1 and isinstance(load.coords[moved[0]], Index) else (None,)
        where = tile if dim is None else before
        writer = TritonWriter(lambda axes: where if axes else self.per_batch, self.real, self.count)
        writer.names["k"] = column if dim is None else f"{column}_lane"
        pointer = f"p{load.operand} + {writer.offset(load)}"
        if dim is not None:
            before.lines.append(f"{name}_at = {pointer}")
            pointer = f"{name}_at + tl.cast(k0, tl.int64) * s{load.operand}_{dim}"
        writer.names["k"] = column
        guards, inside = [f"{feature}_ok", f"{column}_ok"], [] if full else [f"{feature}_ok"]
        result, whole = (writer.tile(load, pointer, size, chosen, cast=self._mixed()) for chosen in (guards, inside))
        return Stream(before.lines, tile.lines, result, whole, self.copied(name, load))

    def copied(self, name: str, load: Load) -> str:
        """A tile by its tensor descriptor; empty where there is none."""
        rows = rows_of(load) if self.described else None
        width = widened(self.spec.v_dim if name == "value" else self.spec.qk_dim)
        return "" if rows is None else self.writer().copied(load, rows, name, width)

    def _mixed(self) -> bool:
        return len({x.dtype for x in (self.spec.query, self.spec.key, self.spec.value)}) > 1

    def bound(self, bound: Bound) -> dict[str, TileProgram]:
        """Its values for the queries q0 and q1."""
        found = {}
        for at in ("q0", "q1"):
            block = Block()
            writer = TritonWriter(lambda axes, block=block: block if "q" in axes else self.per_batch, self.real, self.count)  # type: ignore[misc]
            writer.names["q"] = at
            found[at] = TileProgram(block.lines, writer.value(bound.node))
        return found

    def limits(self) -> list[Limit]:
        """Of the keys that queries q0 to q1 see."""
        found = []
        for bound in self.computed.bounds:
            values = self.bound(bound)
            found += [Limit(name, values[at].lines, values[at].result) for at, name in ENDS[bound.name].items()]
        return found

    def extra(self, node: Expr) -> str:
        text = self.writer().value(node)
        return f"tl.reshape({text}, [BM])" if self.row_axes & expr.axes(node) else text

    def seen(self) -> list[str]:
        """What must hold for an entry, beside the residual."""
        return lanes_within(self.spec, self.writer())

    def skip(self) -> TileProgram:
        """Whether an entry is seen, with the residual."""
        tile, residual = Block(), self.computed.residual
        conditions = [*self.seen(), "q_ok", *([] if residual is None else [self.writer(tile).value(residual)])]
        return TileProgram(tile.lines, " & ".join(conditions))


def _may_be_huge(node: Expr) -> bool:
    """Whether scores may have been masked by addition: digits of what remains, or all, would be lost in a multiplication."""
    return any(
        (isinstance(n, Load) and n.dtype in expr.FLOATS and expr.axes(n) & {"q", "k"})
        or (isinstance(n, Const) and n.dtype in expr.FLOATS and abs(n.value) > _ORDINARY)
        for n in expr.walk(node)
    )


def lanes_within(spec: AttentionSpec, writer: TritonWriter) -> list[str]:
    """What the mask's bounds ask of the keys k0 + k_lane of a tile, and that they are there. Threads know their lanes, so that
    they compare constants with a limit of the row."""
    bounds = {b.name: b.node for b in forward_program(spec).bounds}
    upper = "kv_len" if "upper" not in bounds else _held(writer, bounds["upper"], always=True)
    lower = [f"(k_lane >= {_held(writer, bounds['lower'])} - k0)"] if "lower" in bounds else []
    return [*lower, f"(k_lane < {upper} - k0)"]


def _held(writer: TritonWriter, bound: Expr, always: bool = False) -> str:
    """A bound in 32 bits: held within the keys that there are if it may take more, or ``always``."""
    if always or not fits_a_word(bound):
        within = apply("minimum", apply("maximum", bound, const(0), dtype="int64"), symbol("kv_len"), dtype="int64")
        bound = apply("cast", within, dtype="int32")
    return writer.value(bound)


def mask_axes(spec: AttentionSpec) -> tuple[int, ...]:
    """The batch dimensions that tell which tiles are visited."""
    mask = spec.mask
    roots = [] if mask is None else [n for n in (mask.lower, mask.upper, mask.residual, mask.tiles) if n is not None]
    return tuple(i for i in range(spec.batch) if any(f"b{i}" in expr.axes(root) for root in roots))


def call_context(source: TritonSource, plan: TritonPlan) -> dict[str, object]:
    """What every kernel that attends to keys needs: its arguments, and the pieces of ``tile.py.jinja``."""
    spec, computed = source.spec, source.computed
    visible, factor, residual, threshold = computed.visible, computed.factor, computed.residual, computed.threshold
    full = (spec.qk_dim == plan.width, spec.v_dim == plan.v_width)  # else conditions on features take registers
    return Arguments(spec).names() | {
        "batch": spec.batch, "qk_dim": spec.qk_dim, "v_dim": spec.v_dim, "real": source.real, "mask_axes": mask_axes(spec),
        "residual": residual is not None, "width": plan.width, "v_width": plan.v_width,
        "query": source.matrix(spec.query), "query_copied": source.copied("query", spec.query),
        "key": source.stream("key", spec.key, full[0], full[0] and plan.stages > 1),
        "value": source.stream("value", spec.value, full[1], full[1] and plan.stages > 1),
        "full": source.program(visible, factor, []),
        "partial": source.program(visible, factor, source.seen(), predicate=residual), "skip": source.skip(),
        "recomputed": None if threshold is None else source.program(spec.score, 1.0, ["k_ok"], as_eager=True),
        "weight": source.weight(), "extras": [source.extra(x) for x in spec.extra_logits], "factor": repr(factor),
        "threshold": repr(threshold), "empty_row": spec.empty_row, "normalisation": spec.normalisation, "softmax": spec.softmax,
        "wide_weights": spec.normalisation == "sum" and spec.value.dtype == "float16",
        "hidden": '-float("inf")' if spec.softmax else "0.0", "per_batch": source.per_batch, "per_row": source.per_row,
        "out_strides": strides("out", spec.batch + 2), "out_at": _out_at(spec),
    }  # fmt: skip


def header(spec: AttentionSpec, plan: object) -> list[str]:
    return [*header_lines(spec), f"plan  {plan}"]


def render_triton(spec: AttentionSpec, plan: TritonPlan) -> str:
    """One Python module with the kernel ENTRY."""
    source = TritonSource(spec, described=plan.described)
    context = call_context(source, plan) | {"entry": ENTRY, "walk": _walk(source, plan)}
    return rendered("forward", spec, header(spec, plan), context)


def _walk(source: TritonSource, plan: TritonPlan) -> Walk:
    spec, limits = source.spec, source.limits()
    listed = source.computed.residual is not None
    # Where features do not fill a tile, and are loaded, their conditions would take the registers of a second loop.
    separate = bool(limits) or (spec.qk_dim, spec.v_dim) == (plan.width, plan.v_width)
    return Walk(
        "k", limits, listed, starts_partial=any(limit.name == "begin" for limit in limits),
        full=(separate or plan.described) and not listed, full_if="" if separate else "DESCRIBED", ahead=True,
    )  # fmt: skip


def _out_at(spec: AttentionSpec) -> str:
    places = zip([*(f"b{i}" for i in range(spec.batch)), "q", "e"], strides("out", spec.batch + 2), strict=True)
    return " + ".join(f"tl.cast({name}, tl.int64) * {stride}" for name, stride in places)
