"""Score programs whose lanes are keys, one query at a time: what the matrix core runs between its two products."""

from __future__ import annotations

from dataclasses import dataclass, field

from fuse.ir.expr import Expr, Load, Prob, Score, walk
from fuse.kernel.addressing import is_affine, is_separable
from fuse.targets.cpp.write import C_TYPES, Body, CppValue, K, Q, Writer, kind_of, scalar_function


@dataclass
class KeyProgram:
    """A functor of ``shared/keys.h.jinja``: ``row`` runs once per query and tile of keys, ``entry`` once per vector of keys."""

    name: str
    comment: str
    argument: str
    result: str = ""
    row: Body = field(default_factory=lambda: Body(prefix="r."))
    entry: Body = field(default_factory=lambda: Body(lanes=True))


@dataclass
class KeyRuns:
    """Loads at a place that is a part of the query plus a part of the key, shared by the programs of a source: see runs.h.

    found   name and body of a function of k, the key's part, by load
    """

    found: dict[Load, tuple[str, str]] = field(default_factory=dict)

    def name(self, node: Load, column: str) -> str:
        return self.found.setdefault(node, (f"run{len(self.found)}", column))[0]

    def context(self) -> list[dict[str, str]]:
        """What ``shared/key_runs.h.jinja`` needs, once all programs are written."""
        return [{"name": name, "text": text} for name, text in self.found.values()]


class KeyWriter(Writer):
    """Loads that are linear in the key, or piecewise so, are read along the keys; others are gathered, lane by lane."""

    def __init__(self, batch_index: Body, program: KeyProgram, runs: KeyRuns, count: list[int]) -> None:
        def place(found: frozenset[str]) -> Body:
            return program.entry if "k" in found else program.row if "q" in found else batch_index

        leaves: dict[Expr, CppValue] = {Q: CppValue("q", "long", False), K: CppValue("k", "int", True)}
        super().__init__(place, leaves=leaves, count=count)
        self._row, self._runs = program.row, runs

    def _load(self, node: Load, body: Body) -> str:
        affine = all(is_affine(c, frozenset("k")) for c in node.coords)
        if not body.lanes or not (affine or is_separable(node)):
            return super()._load(node, body)
        name = f"along{self._name()[1:]}"
        ctype = C_TYPES[node.dtype]
        if not affine:
            row, column = self.separate_place(node)
            self._row.members.append((f"Along<{ctype}>", name))
            first = f"(const {ctype}*)c.data[{node.operand}] + [&]() -> int64_t {{ {' '.join(row.splitlines())} }}()"
            self._row.lines.append(f"r.{name}.read({first}, t.{self._runs.name(node, column)});")
            return f"along_{kind_of(node, True)}(r.{name}, n)"
        offset, inside = (scalar_function(f, self.count) for f in (lambda w: w.offset(node), lambda w: w.inside(node)))
        self._row.members.append((f"Along<{ctype}>", name))
        parts = ", ".join(f"[&](int64_t k) {{ {' '.join(body.splitlines())} }}" for body in (offset, inside))
        self._row.lines.append(f"r.{name}.read(c.data[{node.operand}], k0, nk, {parts});")
        return f"along_{kind_of(node, True)}(r.{name}, n)"

    def _draw(self, node: Expr) -> str:
        """A vector of a row of numbers; those with a plane of their own are drawn one by one."""
        name = f"drawn{self._name()[1:]}"
        seed, plane = self.drawn_by(node)
        if seed:
            self._row.members.append(("const R*", name))
            self._row.lines.append(f"static thread_local DrawnRows<BK> of_{name};")
            self._row.lines.append(f"r.{name} = of_{name}.row({seed}, {plane}, q, k0);")
        else:
            self._row.members.append(("R", f"{name}[BK]"))
            value = " ".join(scalar_function(lambda w: w.value(node).text, self.count).splitlines())
            self._row.lines.append(f"for (int64_t k = k0; k < k0 + nk; k++) r.{name}[k - k0] = [&] {{ {value} }}();")
        return f"load(r.{name} + n)"


def key_program(
    batch_index: Body,
    runs: KeyRuns,
    count: list[int],
    name: str,
    comment: str,
    node: Expr,
    bounds: tuple[str, ...] = (),
    predicate: Expr | None = None,
    hidden: str = "",
) -> KeyProgram:
    """The score or weight ``node`` of every entry; ``hidden`` outside the ``bounds`` and where ``predicate`` is false."""
    argument = "prob" if name == "Weight" else "score"
    program = KeyProgram(name, comment, argument)
    writer = KeyWriter(batch_index, program, runs, count)
    writer.leaves |= {leaf: CppValue(argument, "real", True) for leaf in walk(node) if isinstance(leaf, (Score, Prob))}
    program.result = writer.value(node).spread("real")
    allowed = [bound(program, name) for name in bounds]
    if predicate is not None:
        allowed.append(f"({writer.value(predicate).spread('bool')})")
    if allowed:
        program.result = f"select({' & '.join(allowed)}, {program.result}, {hidden})"
    return program


def bound(program: KeyProgram, name: str) -> str:
    """The test that a key is inside the mask's bound ``name``."""
    program.row.define("int64_t", f"clamp64({name}_key(c, b, q), 0, c.kv_len)", name)
    return f"(k {'>=' if name == 'lower' else '<'} vi(r.{name}))"
