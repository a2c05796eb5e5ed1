"""Expressions as C++: scalars where a value is the same for a whole vector of queries, lanes where it is not.

Lanes are query positions. A node is computed once per batch index, once per block of queries, once per key or once per
vector, according to the indices it depends on. The functions and types used here are those of ``templates/cpp/*.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fuse.expr import COMPARISONS, FLOATS, Apply, Const, Expr, Index, Load, Prob, Score, Symbol, axes, contains, index
from fuse.roundings import as_taken, decides

C_TYPES = {
    "float64": "double", "float32": "float", "bfloat16": "Bf16", "float16": "_Float16", "int64": "int64_t",
    "int32": "int32_t", "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t", "bool": "bool",
}  # fmt: skip
ROUND = {"bfloat16": "round_bf16", "float16": "round_f16", "float32": "round_f32", "float64": "round_f64"}
HALVES = ("bfloat16", "float16")

# Kernels refuse longer sequences, so index arithmetic can be proved to fit 32-bit lanes.
MAX_LENGTH = 2**24
_LANE_LIMIT = 2**30
_INT_RANGES = {"int32": 2**31, "int16": 2**15, "int8": 2**7, "uint8": 2**8, "bool": 1}

_INFIX = {"add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}

Q, K = index("q"), index("k")

Interval = tuple[int, int] | None


@dataclass
class Body:
    """Statements of one function, or of one loop of it, and the names of the values they define.

    prefix, suffix  around a value's name where it is used: members are ``s.x1``, arrays ``r.x1[v]``
    lanes           whether values here are vectors
    """

    lanes: bool = False
    prefix: str = ""
    suffix: str = ""
    lines: list[str] = field(default_factory=list)
    members: list[tuple[str, str]] = field(default_factory=list)
    known: dict[tuple[Expr, bool], Value] = field(default_factory=dict)

    def define(self, ctype: str, text: str, name: str) -> str:
        used = f"{self.prefix}{name}{self.suffix}"
        if self.prefix:
            self.members.append((ctype, name))
            self.lines.append(f"{used} = {text};")
        else:
            self.lines.append(f"const {ctype} {name} = {text};")
        return used


@dataclass(frozen=True)
class Value:
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

    exact   round every value to its dtype, as eager does after every operation; what decides something is always so computed
    leaves  values of nodes that are there already
    """

    place: Callable[[frozenset[str]], Body]
    exact: bool = False
    stages: list[Stage | Draw] = field(default_factory=list)
    leaves: dict[Expr, Value] = field(default_factory=dict)
    count: list[int] = field(default_factory=lambda: [0])

    def value(self, node: Expr, exact: bool = False) -> Value:
        """``exact``: rounded as eager rounds it, and all that it is computed of."""
        exact = exact or self.exact
        if node in self.leaves and not (exact and isinstance(node, Score)):
            return self.leaves[node]
        if isinstance(node, Const):
            return Value(_literal(node), kind_of(node, False), False)
        if isinstance(node, Symbol):
            return Value(f"c.{node.name}", "long", False)
        body = self.place(_axes(node))
        if isinstance(node, Index):
            return Value(_index(node, body), "int" if body.lanes else "long", body.lanes)
        key = (node, exact and node.dtype in FLOATS and not is_read(node))
        if key not in body.known:
            kind, text = kind_of(node, body.lanes), self._text(node, body, exact)
            text = f"{ROUND[node.dtype]}({text})" if key[1] else text
            body.known[key] = Value(body.define(_ctype(kind, body.lanes), text, self._name()), kind, body.lanes)
        return body.known[key]

    def _text(self, node: Expr, body: Body, exact: bool) -> str:
        if node in self.leaves:
            return self.leaves[node].text
        if isinstance(node, Load):
            return self._load(node, body)
        draws = body.lanes and is_read(node)
        return self._draw(node) if draws else self._apply(node, body, exact or decides(node))

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

    def _apply(self, node: Expr, body: Body, exact: bool) -> str:
        """``exact``: of operands that are rounded as eager rounds them."""
        if not isinstance(node, Apply):
            raise ValueError(f"{node} has no value here")
        args = [self.value(a, exact) for a in (as_taken(node) if exact else node.operands)]
        return self._lanes(node, args, exact) if body.lanes else _scalar(node, [a.text for a in args])

    def _lanes(self, node: Apply, args: list[Value], exact: bool) -> str:
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
        if node.op == "div" and not exact and isinstance(by := node.operands[1], Const) and 1e-30 < abs(by.value) < 1e30:
            return f"{args[0].spread(inner)} * R({1 / by.value!r})"  # a division costs as much as ten products
        text = infix_or_call(node.op, [a.spread(inner) for a in args])
        if node.op in COMPARISONS:
            return f"narrow({text})" if inner == "long" else text
        return text if kind == "bool" else _fit(text, inner, kind)


def _fit(text: str, have: str, want: str) -> str:
    if have == want:
        return text
    return f"narrow({text})" if want == "int" else f"widen_int({text})"


def infix_or_call(op: str, args: list[str]) -> str:
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in _BITWISE:
        return f"{args[0]} {_BITWISE[op]} {args[1]}"
    if op == "div":
        return f"{args[0]} / {args[1]}"
    if op == "neg":
        return f"-{args[0]}"
    if op == "not":
        return f"~{args[0]}"
    return f"f_{op}({', '.join(args)})"


def _scalar(node: Apply, args: list[str]) -> str:
    if node.op == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    if node.op == "not" and node.dtype == "bool":
        return f"!{args[0]}"
    if node.op == "cast":
        if node.dtype in FLOATS:
            return f"R({args[0]})"
        return f"{args[0]} != 0" if node.dtype == "bool" else f"int64_t({C_TYPES[node.dtype]}({args[0]}))"
    return infix_or_call(node.op, args)


def _cast_lanes(node: Apply, arg: Value) -> str:
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


def is_read(node: Expr) -> bool:
    """Whether a value comes from memory, or is drawn: it is as its dtype has it."""
    return isinstance(node, Load) or (isinstance(node, Apply) and node.op == "uniform")


def is_affine(node: Expr, over: frozenset[str] = frozenset({"q", "k"})) -> bool:
    """Whether an integer expression is linear in the indices ``over``, with coefficients that do not depend on them."""
    if not axes(node) & over or isinstance(node, Index):
        return True
    if not isinstance(node, Apply):
        return False
    parts = all(is_affine(a, over) for a in node.operands)
    if node.op == "mul":
        return parts and any(not axes(a) & over for a in node.operands)
    return node.op in ("add", "sub", "neg", "cast") and parts and all(a.dtype == "int64" for a in node.operands)


def is_separable(node: Load) -> bool:
    """Whether no coordinate depends on both the query and the key."""
    return all(len(axes(c) & {"q", "k"}) < 2 for c in node.coords)


def anywhere(leaf: Expr) -> Interval:
    """Bounds of an index or a symbol that hold in every call; None for a symbol of which nothing is known."""
    if isinstance(leaf, Symbol):
        length = leaf.name in ("q_len", "kv_len") or (leaf.name[0] == "B" and leaf.name[1:].isdigit())
        return (0, MAX_LENGTH) if length else None
    return (0, MAX_LENGTH)


def interval(node: Expr, leaves: Callable[[Expr], Interval] = anywhere) -> Interval:
    """Bounds of an integer, from those of the indices and symbols in it; None where nothing is known."""
    if isinstance(node, Const):
        return (int(node.value), int(node.value))
    if isinstance(node, (Index, Symbol)):
        return leaves(node)
    if isinstance(node, Apply) and (bounds := _interval_of_operation(node, leaves)):
        return bounds
    if node.dtype in _INT_RANGES:
        limit = _INT_RANGES[node.dtype]
        return (0, limit) if node.dtype in ("uint8", "bool") else (-limit, limit)
    return None


def _interval_of_operation(node: Apply, leaves: Callable[[Expr], Interval]) -> Interval:
    parts = [interval(a, leaves) for a in node.operands if a.dtype not in FLOATS]
    known = [p for p in parts if p is not None]
    if not known or len(known) != len(node.operands):
        return None
    (a, b), (c, d) = known[0], known[-1]
    if node.op == "where":
        return (min(known[1][0], c), max(known[1][1], d))
    if node.op in ("floordiv", "mod") and c > 0:
        return (a // c if a < 0 else a // d, b // d if b < 0 else b // c) if node.op == "floordiv" else (0, d - 1)
    table: dict[str, Callable[[], tuple[int, int]]] = {
        "add": lambda: (a + c, b + d), "sub": lambda: (a - d, b - c), "neg": lambda: (-b, -a), "cast": lambda: (a, b),
        "mul": lambda: (min(a * c, a * d, b * c, b * d), max(a * c, a * d, b * c, b * d)),
        "minimum": lambda: (min(a, c), min(b, d)), "maximum": lambda: (max(a, c), max(b, d)),
        "abs": lambda: (0, max(abs(a), abs(b))), "sign": lambda: (-1, 1),
    }  # fmt: skip
    return table[node.op]() if node.op in table else None


def kind_of(node: Expr, lanes: bool) -> str:
    if node.dtype in FLOATS:
        return "real"
    if node.dtype == "bool":
        return "bool"
    if not lanes:
        return "long"
    bounds = interval(node)
    fits = bounds is not None and bounds[0] >= -_LANE_LIMIT and bounds[1] <= _LANE_LIMIT
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
        return f"s.{node.axis}"
    return "r.q[v]" if body.lanes else node.axis


# --------------------------------------------------------------------------------------------------- whole functions


def scalar_function(write: Callable[[Writer], str], count: list[int]) -> str:
    """The body of a function of int64 indices that returns what ``write`` gives; everything in it is scalar."""
    body = Body()
    result = write(Writer(lambda _: body, count=count))
    return "\n".join([*body.lines, f"return {result};"])
