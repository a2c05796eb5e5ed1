"""Expressions as C++: scalars where a value is the same for a whole vector of queries, lanes where it is not.

Lanes are query positions. A node is computed once per batch index, once per block of queries, once per key or once per
vector, according to the indices it depends on. The functions and types used here are those of ``templates/cpp/prelude/*.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fuse.ir.expr import COMPARISONS, FLOATS, Apply, Const, Expr, Index, Load, Prob, Score, Symbol, axes, contains, index
from fuse.ir.interval import anywhere, range_of
from fuse.ir.operators import OPERATORS
from fuse.ir.roundings import as_taken, decides, is_read
from fuse.kernel.addressing import is_affine, is_separable

C_TYPES = {
    "float64": "double", "float32": "float", "bfloat16": "Bf16", "float16": "_Float16", "int64": "int64_t",
    "int32": "int32_t", "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t", "bool": "bool",
}  # fmt: skip
ROUND = {"bfloat16": "round_bf16", "float16": "round_f16", "float32": "round_f32", "float64": "round_f64"}

_LANE_LIMIT = 2**30

Q, K = index("q"), index("k")


@dataclass
class Body:
    """Statements of one function, or of one loop of it, and the names of the values they define.

    prefix, suffix  around a value's name where it is used: members are ``b.x1``, arrays ``r.x1[v]``
    lanes           whether values here are vectors
    """

    lanes: bool = False
    prefix: str = ""
    suffix: str = ""
    lines: list[str] = field(default_factory=list)
    members: list[tuple[str, str]] = field(default_factory=list)
    known: dict[tuple[Expr, bool], CppValue] = field(default_factory=dict)

    def define(self, ctype: str, text: str, name: str) -> str:
        used = f"{self.prefix}{name}{self.suffix}"
        if self.prefix:
            self.members.append((ctype, name))
            self.lines.append(f"{used} = {text};")
        else:
            self.lines.append(f"const {ctype} {name} = {text};")
        return used


@dataclass(frozen=True)
class CppValue:
    """Text of a computed value; ``kind``: real, int (lanes as wide as the reals), long (int64) or bool."""

    text: str
    kind: str
    lanes: bool

    def spread(self, kind: str) -> str:
        """The value as a vector of ``kind``."""
        if not self.lanes:
            return {"real": "vr", "int": "vi", "long": "vl", "bool": "vm"}[kind] + f"({self.text})"
        if self.kind == "long" and kind == "int":
            return f"narrow({self.text})"
        if self.kind == "int" and kind == "long":
            return f"widen_int({self.text})"
        return self.text


@dataclass(frozen=True)
class Stage:
    """A tile of an operand laid out as the lanes need it, before the program that reads it runs.

    place   bodies of two functions. If the place is linear, of (q, k): the element's position, and whether every
            coordinate is in range; if it is separable, the query's part of the position, and the key's
    """

    load: Load
    name: str
    linear: bool
    place: tuple[str, str]
    ctype: str
    element: str


@dataclass(frozen=True)
class Draw:
    """A tile of random numbers, as the lanes need it.

    value        body of the function of (q, k) that gives one
    seed, plane  where rows are queries and columns keys, so that many are drawn at a time; else empty
    """

    name: str
    value: str
    seed: str = ""
    plane: str = ""


@dataclass
class Writer:
    """Writes values into the bodies that ``place`` chooses by the indices they depend on.

    as_eager  round every value to its dtype, as eager does after every operation; what decides something always is
    leaves    values of nodes that are there already
    """

    place: Callable[[frozenset[str]], Body]
    as_eager: bool = False
    stages: list[Stage | Draw] = field(default_factory=list)
    leaves: dict[Expr, CppValue] = field(default_factory=dict)
    count: list[int] = field(default_factory=lambda: [0])

    def value(self, node: Expr, as_eager: bool = False) -> CppValue:
        """``as_eager``: rounded as eager rounds it, and all that it is computed of."""
        as_eager = as_eager or self.as_eager
        if node in self.leaves and not (as_eager and isinstance(node, Score)):
            return self.leaves[node]
        if isinstance(node, Const):
            return CppValue(_literal(node), kind_of(node, False), False)
        if isinstance(node, Symbol):
            return CppValue(f"c.{node.name}", "long", False)
        body = self.place(_axes(node))
        if isinstance(node, Index):
            return CppValue(_index(node, body), "int" if body.lanes else "long", body.lanes)
        key = (node, as_eager and node.dtype in FLOATS and not is_read(node))
        if key not in body.known:
            kind, text = kind_of(node, body.lanes), self._text(node, body, as_eager)
            text = f"{ROUND[node.dtype]}({text})" if key[1] else text
            body.known[key] = CppValue(body.define(_ctype(kind, body.lanes), text, self._name()), kind, body.lanes)
        return body.known[key]

    def _text(self, node: Expr, body: Body, as_eager: bool) -> str:
        if node in self.leaves:
            return self.leaves[node].text
        if isinstance(node, Load):
            return self._load(node, body)
        draws = body.lanes and is_read(node)
        return self._draw(node) if draws else self._apply(node, body, as_eager or decides(node))

    def _name(self) -> str:
        self.count[0] += 1
        return f"x{self.count[0]}"

    # ------------------------------------------------------------------------------------------------------- loads

    def _load(self, node: Load, body: Body) -> str:
        ctype = C_TYPES[node.dtype]
        kind = kind_of(node, body.lanes)
        linear = all(is_affine(c) for c in node.coords)
        if body.lanes and {"q", "k"} <= _axes(node) and (linear or is_separable(node)):
            name = f"tile{self._name()[1:]}"
            place = self._linear_place(node) if linear else self.separate_place(node)
            element = {"real": "R", "bool": "R", "int": "I", "long": "int64_t"}[kind]
            self.stages.append(Stage(node, name, linear, place, ctype, element))
            return f"load_lanes({name} + (i * N + v) * W)" + (" != 0" if kind == "bool" else "")
        if not body.lanes:
            read = {"real": "read_real", "long": "read_int", "bool": "read_int"}[kind]
            return f"{read}<{ctype}>(c.data[{node.operand}], {self.offset(node)})" + (" != 0" if kind == "bool" else "")
        return f"gather_{kind}<{ctype}>(c.data[{node.operand}], {self.offset(node, lanes=True)})"

    def _linear_place(self, node: Load) -> tuple[str, str]:
        return scalar_function(lambda w: w.offset(node), self.count), scalar_function(lambda w: w.inside(node), self.count)

    def separate_place(self, node: Load) -> tuple[str, str]:
        """Bodies of functions of q and of k, which add up to the position."""
        of_key = {dim for dim, c in enumerate(node.coords) if "k" in axes(c)}
        parts = (set(range(len(node.coords))) - of_key, of_key)
        row, column = (scalar_function(lambda w, dims=dims: w.offset(node, dims=dims), self.count) for dims in parts)  # type: ignore[misc]
        return row, column

    def offset(self, node: Load, lanes: bool = False, strides: str | None = None, dims: Iterable[int] | None = None) -> str:
        """Position of the element in its operand, every coordinate held inside the operand.

        strides  name of an array of other strides
        dims     dimensions that count; None: all
        """
        terms = []
        for dim, coord in enumerate(node.coords):
            if dims is not None and dim not in dims:
                continue
            size, stride = f"c.size[{node.operand}][{dim}]", f"{strides or f'c.stride[{node.operand}]'}[{dim}]"
            value = self.value(coord)
            inside = isinstance(coord, (Const, Index))
            if lanes:
                position = value.spread("long") if inside else f"inside({value.spread('long')}, {size})"
            else:
                position = value.text if inside else f"clamp64({value.text}, 0, {size} - 1)"
            if position != "0":
                terms.append(f"{position} * {stride}")
        total = " + ".join(terms) or "0"
        return f"vl({total})" if lanes else total

    def inside(self, node: Load) -> str:
        tests = [
            f"uint64_t({self.value(coord).text}) < uint64_t(c.size[{node.operand}][{dim}])"
            for dim, coord in enumerate(node.coords) if not isinstance(coord, (Const, Index))
        ]  # fmt: skip
        return " && ".join(tests) or "true"

    def _draw(self, node: Expr) -> str:
        """A number of a tile that is drawn before the program runs."""
        name = f"tile{self._name()[1:]}"
        value = scalar_function(lambda w: w.value(node).text, self.count)
        seed, plane = self.drawn_by(node)
        self.stages.append(Draw(name, value, seed, plane))
        return f"load_lanes({name} + (i * N + v) * W)"

    def drawn_by(self, node: Expr) -> tuple[str, str]:
        """Seed and plane of numbers whose rows are queries and whose columns are keys; empty for others."""
        seed, plane, row, column = node.args
        if (axes(seed) | axes(plane)) & {"q", "k"} or not (row is Q and column is K):
            return "", ""
        return self.value(seed).text, self.value(plane).text

    # -------------------------------------------------------------------------------------------------- operations

    def _apply(self, node: Expr, body: Body, as_eager: bool) -> str:
        """``as_eager``: of operands that are rounded as eager rounds them."""
        if not isinstance(node, Apply):
            raise ValueError(f"{node} has no value here")
        args = [self.value(a, as_eager) for a in (as_taken(node) if as_eager else node.operands)]
        return self._lanes(node, args, as_eager) if body.lanes else _scalar(node, [a.text for a in args])

    def _lanes(self, node: Apply, args: list[CppValue], as_eager: bool) -> str:
        if node.op == "cast":
            return _cast_lanes(node, args[0])
        kind = kind_of(node, True)
        if node.op == "where":
            return f"select({args[0].spread('bool')}, {args[1].spread(kind)}, {args[2].spread(kind)})"
        source = node.operands[0]
        if source.dtype in FLOATS or source.dtype == "bool":
            inner = "real" if source.dtype in FLOATS else "bool"
        else:
            wide = kind == "long" or any(a.lanes and a.kind == "long" for a in args)
            inner = "long" if wide else "int"
        shift = _power_of_two(node.operands[-1])
        if node.op in ("floordiv", "mod") and inner != "real" and shift is not None:
            low = (
                f"{args[0].spread(inner)} >> {shift}" if node.op == "floordiv" else f"{args[0].spread(inner)} & {2**shift - 1}"
            )
            return _fit(low, inner, kind)
        if node.op == "div" and not as_eager and isinstance(by := node.operands[1], Const) and 1e-30 < abs(by.value) < 1e30:
            return f"{args[0].spread(inner)} * R({1 / by.value!r})"  # a division costs as much as ten products
        text = OPERATORS[node.op].cpp.format(*(a.spread(inner) for a in args))
        if node.op in COMPARISONS:
            return f"narrow({text})" if inner == "long" else text
        return text if kind == "bool" else _fit(text, inner, kind)


def _fit(text: str, have: str, want: str) -> str:
    if have == want:
        return text
    return f"narrow({text})" if want == "int" else f"widen_int({text})"


def _scalar(node: Apply, args: list[str]) -> str:
    if node.op == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    if node.op == "not" and node.dtype == "bool":
        return f"!{args[0]}"
    if node.op == "cast":
        if node.dtype in FLOATS:
            return f"R({args[0]})"
        return f"{args[0]} != 0" if node.dtype == "bool" else f"int64_t({C_TYPES[node.dtype]}({args[0]}))"
    return OPERATORS[node.op].cpp.format(*args)


def _cast_lanes(node: Apply, arg: CppValue) -> str:
    source, target = node.operands[0].dtype, node.dtype
    if target in FLOATS:
        if source in FLOATS:
            return arg.text
        if arg.kind == "long":
            return f"__builtin_convertvector({arg.text}, VR)"
        return f"-to_real({arg.text})" if source == "bool" else f"to_real({arg.text})"
    if target == "bool":
        return f"narrow({arg.text} != 0)" if arg.kind == "long" else f"{arg.text} != 0"
    kind = kind_of(node, True)
    if source in FLOATS:
        return f"__builtin_convertvector({arg.text}, {'VL' if kind == 'long' else 'VI'})"
    text = f"-{arg.text}" if source == "bool" else arg.text
    bits = {"int8": 8, "uint8": 8, "int16": 16}.get(target)
    text = _fit(text, arg.kind if arg.kind != "bool" else "int", kind)
    if bits is None:
        return text
    return f"({text} & 255)" if target == "uint8" else f"wrap<{bits}>({text})"


# --------------------------------------------------------------------------------------------------- facts about nodes


def _axes(node: Expr) -> frozenset[str]:
    """Indices that choose where a node is computed; the score and the weight exist per query and key."""
    return axes(node) | ({"q", "k"} if contains(node, Score) or contains(node, Prob) else frozenset())


def kind_of(node: Expr, lanes: bool) -> str:
    if node.dtype in FLOATS:
        return "real"
    if node.dtype == "bool":
        return "bool"
    if not lanes:
        return "long"
    found = range_of(node, anywhere)
    fits = found.low >= -_LANE_LIMIT and found.high <= _LANE_LIMIT
    return "int" if fits or node.dtype != "int64" else "long"


def _ctype(kind: str, lanes: bool) -> str:
    if lanes:
        return {"real": "VR", "int": "VI", "long": "VL", "bool": "VI"}[kind]
    return {"real": "R", "long": "int64_t", "bool": "bool"}[kind]


def _power_of_two(node: Expr) -> int | None:
    if isinstance(node, Const) and isinstance(node.value, int) and node.value > 0 and node.value & (node.value - 1) == 0:
        return node.value.bit_length() - 1
    return None


def _literal(node: Const) -> str:
    if node.dtype == "bool":
        return "true" if node.value else "false"
    if node.dtype not in FLOATS:
        return str(node.value) if abs(node.value) < 2**31 else f"INT64_C({node.value})"
    if math.isnan(node.value):
        return "R(NAN)"
    if math.isinf(node.value):
        return "R(INFINITY)" if node.value > 0 else "-R(INFINITY)"
    return f"R({float(node.value)!r})"


def _index(node: Index, body: Body) -> str:
    if node.axis.startswith("b"):
        return f"b.{node.axis}"
    return "r.q[v]" if body.lanes else node.axis


# --------------------------------------------------------------------------------------------------- whole functions


def scalar_function(write: Callable[[Writer], str], count: list[int]) -> str:
    """The body of a function of int64 indices that returns what ``write`` gives; everything in it is scalar."""
    body = Body()
    result = write(Writer(lambda _: body, count=count))
    return "\n".join([*body.lines, f"return {result};"])
