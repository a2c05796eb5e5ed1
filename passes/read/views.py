"""How elements of views, gathers and concatenations are read: each maps coordinates to coordinates."""

from __future__ import annotations

from typing import Any

import sympy

from fuse.ir import expr
from fuse.ir.expr import Expr, Load, apply, const
from fuse.ir.index import IndexExpr
from fuse.passes.read.elements import Reader, arguments, as_index, dims, handles, has_opaque, op_name
from fuse.passes.read.pieces import as_others, read_piece
from fuse.passes.read.pointwise import read
from fuse.passes.read.trace import Value

Coords = tuple[IndexExpr, ...]
ZERO = sympy.Integer(0)
TRUE = const(True, "bool")


@handles("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(r: Reader, v: Value, coords: Coords) -> Expr:
    source = r.space.reshape(coords, dims(v), dims(v.args[0]))
    found = r.element(v.args[0], source)
    if not r.reads_fixed_strides(coords) or r.reads_fixed_strides(source) or has_opaque(found):
        return found
    if isinstance(found, Load):  # another view may have undone the split
        divides = not r.reads_fixed_strides([r.index(c) for c in found.coords])
    else:  # of both positions it may be far larger than what it is computed from
        divides = len(expr.axes(found) & {x.name for x in r.inner}) < 2
    # Splitting a position by division costs more per entry than reading the tensor in its new shape
    return r.load(v, coords) if divides else found


@handles("expand")
def _expand(r: Reader, v: Value, coords: Coords) -> Expr:
    own = dims(v.args[0])
    kept = coords[len(coords) - len(own) :]
    return r.element(v.args[0], tuple(ZERO if n == 1 else c for c, n in zip(kept, own, strict=True)))


@handles("permute")
def _permute(r: Reader, v: Value, coords: Coords) -> Expr:
    order = [d % len(coords) for d in v.args[1]]
    return r.element(v.args[0], tuple(coords[order.index(i)] for i in range(len(coords))))


@handles("transpose", "t", "numpy_T")
def _transpose(r: Reader, v: Value, coords: Coords) -> Expr:
    a, b = (v.args[1], v.args[2]) if op_name(v) == "transpose" else (0, -1)
    out = list(coords)
    if out:
        out[a], out[b] = out[b], out[a]
    return r.element(v.args[0], tuple(out))


@handles("unsqueeze")
def _unsqueeze(r: Reader, v: Value, coords: Coords) -> Expr:
    dim = v.args[1] % len(coords)
    return r.element(v.args[0], coords[:dim] + coords[dim + 1 :])


@handles("squeeze")
def _squeeze(r: Reader, v: Value, coords: Coords) -> Expr:
    source = dims(v.args[0])
    dim = v.args[1] if len(v.args) > 1 else range(len(source))
    chosen = {d % len(source) for d in ([dim] if isinstance(dim, int) else dim)} if source else set()
    left = list(coords)
    return r.element(v.args[0], tuple(ZERO if d in chosen and n == 1 else left.pop(0) for d, n in enumerate(source)))


@handles("slice")
def _slice(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    dim, step = (a["dim"] or 0) % len(coords), as_index(a["step"] or 1)
    size = dims(v.args[0])[dim]
    start = _position(r, a["start"], size)
    if start is None:
        return r.load(v, coords)
    return r.element(v.args[0], (*coords[:dim], start + step * coords[dim], *coords[dim + 1 :]))


def _position(r: Reader, x: Any, size: IndexExpr) -> IndexExpr | None:
    """Where a slice begins or ends: negative from the end, cut off at the ends."""
    if x is None:
        return ZERO
    p = as_index(x)
    if r.space.nonnegative(-p - 1):
        p = size + p
        return p if r.space.nonnegative(p) else (ZERO if r.space.nonnegative(-p) else None)
    return p if r.space.nonnegative(size - p) and r.space.nonnegative(p) else None


@handles("select")
def _select(r: Reader, v: Value, coords: Coords) -> Expr:
    dim, at = v.args[1] % (len(coords) + 1), as_index(v.args[2])
    if r.space.nonnegative(-at - 1):
        at = at + dims(v.args[0])[dim]
    return r.element(v.args[0], (*coords[:dim], at, *coords[dim:]))


@handles("unbind")
def _unbind(r: Reader, v: Value, coords: Coords) -> Expr:
    dim = arguments(v)["dim"] % (len(coords) + 1)
    return r.element(v.args[0], (*coords[:dim], sympy.Integer(v.output), *coords[dim:]))


@handles("split", "split_with_sizes", "chunk")
def _split(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    dim = a["dim"] % len(coords)
    if op_name(v) == "split_with_sizes":
        start = sum((as_index(n) for n in a["split_sizes"][: v.output]), ZERO)
    else:
        start = as_index(a["split_size"]) * v.output if op_name(v) == "split" else None
    if start is None:
        return r.load(v, coords)
    return r.element(v.args[0], (*coords[:dim], coords[dim] + start, *coords[dim + 1 :]))


@handles("flip")
def _flip(r: Reader, v: Value, coords: Coords) -> Expr:
    flipped = {d % len(coords) for d in v.args[1]}
    return r.element(
        v.args[0], tuple(n - 1 - c if d in flipped else c for d, (c, n) in enumerate(zip(coords, dims(v), strict=True)))
    )


@handles("repeat")
def _repeat(r: Reader, v: Value, coords: Coords) -> Expr:
    source = dims(v.args[0])
    kept = coords[len(coords) - len(source) :]
    found = tuple(ZERO if n == 1 else r.space.mod(c, n) for c, n in zip(kept, source, strict=True))
    return r.element(v.args[0], found) if r.reads_fixed_strides(found) else r.load(v, coords)


@handles("cat")
def _cat(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    dim = a["dim"] % len(coords)
    begins = [ZERO]
    parts = [t for t in a["tensors"] if len(t.shape) == len(coords)]
    for part in parts:
        begins.append(begins[-1] + dims(part)[dim])
    c, found = coords[dim], []
    for part, begin, end in zip(parts, begins, begins[1:], strict=False):
        if not (r.at_most(end, c) is TRUE or r.at_most(c + 1, begin) is TRUE):
            piece = read_piece(r, part, coords, dim, c - begin)
            found.append((apply("cast", piece, dtype=v.dtype), begin, end))
    pieces = [e for e, _, _ in found]
    out: Expr | None = None
    for e, begin, end in reversed(found):
        e = as_others(r, e, pieces, c, begin) if end - begin == 1 else e
        out = e if out is None else apply("where", r.at_most(c + 1, end), e, out, dtype=v.dtype)
    return r.load(v, coords) if out is None else out


def _cast(r: Reader, part: Value, coords: Coords, dtype: str) -> Expr:
    return apply("cast", r.element(part, coords), dtype=dtype)


@handles("stack")
def _stack(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    dim = a["dim"] % len(coords)
    if not coords[dim].is_Integer:
        return r.load(v, coords)
    return _cast(r, a["tensors"][int(coords[dim])], coords[:dim] + coords[dim + 1 :], v.dtype)


@handles("constant_pad_nd")
def _pad(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    source, at = dims(v.args[0]), list(coords)
    inside: Expr = TRUE
    for i in range(len(a["pad"]) // 2):
        dim, before = len(coords) - 1 - i, as_index(a["pad"][2 * i])
        c = coords[dim] - before
        inside = apply("and", inside, r.at_most(ZERO, c), dtype="bool")
        inside = apply("and", inside, r.at_most(c, source[dim] - 1), dtype="bool")
        at[dim] = c
    at = [r.clamped(c, n) for c, n in zip(at, source, strict=True)] if inside is not TRUE else at
    return apply("where", inside, r.element(v.args[0], tuple(at)), read(r, a["value"], (), v.dtype), dtype=v.dtype)


@handles("roll")
def _roll(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    if not a["dims"]:
        return r.load(v, coords)
    out = list(coords)
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        dim %= len(coords)
        out[dim] = r.space.mod(coords[dim] - as_index(shift), dims(v)[dim])
    return r.element(v.args[0], tuple(out)) if r.reads_fixed_strides(out) else r.load(v, coords)


@handles("gather")
def _gather(r: Reader, v: Value, coords: Coords) -> Expr:
    x, dim, at = v.args[:3]
    dim %= len(coords)
    where = r.gathered(at, coords, dims(x)[dim], wraps=False)
    return r.element(x, (*coords[:dim], where, *coords[dim + 1 :]))


@handles("index_select")
def _index_select(r: Reader, v: Value, coords: Coords) -> Expr:
    x, dim, at = v.args[:3]
    dim %= len(coords)
    where = r.gathered(at, (coords[dim],), dims(x)[dim], wraps=False)
    return r.element(x, (*coords[:dim], where, *coords[dim + 1 :]))


@handles("embedding")
def _embedding(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    if a["padding_idx"] >= 0 or a["scale_grad_by_freq"] or a["sparse"]:  # its gradient is not that of a lookup
        return r.load(v, coords)
    return r.element(a["weight"], (r.gathered(a["indices"], coords[:-1], dims(a["weight"])[0], wraps=False), coords[-1]))


@handles("index")
def _index(r: Reader, v: Value, coords: Coords) -> Expr:
    x, indices = v.args[0], list(v.args[1])
    given = [i for i, t in enumerate(indices) if t is not None]
    tensors = [indices[i] for i in given]
    if any(t.dtype not in ("int64", "int32") for t in tensors):
        return r.load(v, coords)
    rank = max(len(t.shape) for t in tensors)
    adjacent = given == list(range(given[0], given[-1] + 1))
    first = given[0] if adjacent else 0
    shared, rest = coords[first : first + rank], list(coords[:first] + coords[first + rank :])
    source, out = dims(x), []
    for dim in range(len(source)):
        t = indices[dim] if dim < len(indices) else None
        if t is None:
            out.append(rest.pop(0))
        else:
            own = dims(t)
            at = tuple(ZERO if n == 1 else c for c, n in zip(shared[rank - len(own) :], own, strict=True))
            out.append(r.gathered(t, at, source[dim], wraps=True))
    return r.element(x, tuple(out))


@handles("slice_scatter")
def _slice_scatter(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    dim = a["dim"] % len(coords)
    size = dims(v)[dim]
    start = _position(r, a["start"], size)
    if start is None or (a["step"] or 1) != 1:
        return r.load(v, coords)
    n = dims(a["src"])[dim]
    c = coords[dim]
    inside = apply("and", r.at_most(start, c), r.at_most(c, start + n - 1), dtype="bool")
    written = apply("cast", read_piece(r, a["src"], coords, dim, c - start), dtype=v.dtype)
    return apply("where", inside, written, r.element(a["self"], coords), dtype=v.dtype)


@handles("select_scatter")
def _select_scatter(r: Reader, v: Value, coords: Coords) -> Expr:
    a = arguments(v)
    dim, at = a["dim"] % len(coords), as_index(a["index"])
    at = at + dims(v)[dim] if r.space.nonnegative(-at - 1) else at
    here = apply("eq", r.expression(coords[dim]), r.expression(at), dtype="bool")
    written = _cast(r, a["src"], coords[:dim] + coords[dim + 1 :], v.dtype)
    return apply("where", here, written, r.element(a["self"], coords), dtype=v.dtype)
