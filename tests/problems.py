"""Attention problems: how they are written, and what a solution must be."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuse.ir import expr, tile_map
from fuse.ir.expr import COMPARISONS, Expr, Load, Prob, Score, const, index, symbol
from fuse.ir.spec import AttentionSpec, Mask, Operand, verify
from fuse.targets import reference

B0, B1, B2, Q, K, D, E = (index(axis) for axis in ("b0", "b1", "b2", "q", "k", "d", "e"))
Q_LEN, KV_LEN = symbol("q_len"), symbol("kv_len")

Number = float | int | bool


def op(name: str, *args: Expr | Number) -> Expr:
    """A node; numbers and the result take the dtype of the last operand that is an expression."""
    dtype = next(a.dtype for a in reversed(args) if isinstance(a, Expr))
    nodes = [a if isinstance(a, Expr) else const(a, dtype) for a in args]
    return expr.apply(name, *nodes, dtype="bool" if name in COMPARISONS else dtype)


def cast(node: Expr, dtype: str) -> Expr:
    return expr.apply("cast", node, dtype=dtype)


def load(tensor: Tensor, operand: int, *coords: Expr) -> Load:
    return Load(dtype_name(tensor), operand, coords)


def both(*predicates: Expr) -> Expr:
    result = predicates[0]
    for predicate in predicates[1:]:
        result = op("and", result, predicate)
    return result


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def rand(*shape: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(getattr(torch, dtype))


@dataclass(frozen=True)
class Problem:
    """A spec with data to run it on."""

    spec: AttentionSpec
    operands: list[Tensor]
    sizes: list[int]

    @property
    def q_len(self) -> int:
        return dict(zip(self.spec.symbols, self.sizes, strict=True))["q_len"]

    def check(self, out: Tensor) -> None:
        """Fails unless ``out`` has the promised layout, and errs at most twice as much as eager does, and a few roundings."""
        assert out.shape == self.spec.out_shape(self.sizes)
        assert out.stride() == self.spec.out_strides(self.sizes) or out.numel() == 0
        assert dtype_name(out) == self.spec.out_dtype
        exact = reference.attention(self.spec, self.operands, self.sizes)
        with own_products():
            eager = reference.attention(self.spec, self.operands, self.sizes, "eager").double()
        assert torch.equal(out.isnan(), eager.isnan()), "NaN where eager has none, or none where eager has NaN"
        if out.numel():
            # a row that is masked with -1e9 averages in float32, and in float64 does not: eager's own error allows for it
            allowed = 2 * (eager - exact).nan_to_num().abs().amax() + 8 * torch.finfo(out.dtype).eps
            error = (out.double() - exact).nan_to_num().abs().amax()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@contextmanager
def own_products() -> Iterator[None]:
    """Products by torch itself, not by oneDNN, which with AMX carries NaN of a row into the row before it in bfloat16."""
    before = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before, _fp32_precision=None)


def problem(
    dtype: str,
    *extra: Tensor,
    batch: tuple[int, ...] = (2, 3),
    q_len: int = 37,
    kv_len: int | None = None,
    qk_dim: int = 16,
    v_dim: int | None = None,
    kv_batch: tuple[int, ...] | None = None,
    kv_index: Sequence[Expr] | None = None,
    score: Callable[[Expr], Expr | tuple[Expr, Mask]] = lambda s: s,
    extra_logits: tuple[Expr, ...] = (),
    weight: Expr | None = None,
    empty_row: str = "nan",
    out_order: tuple[int, ...] | None = None,
    symbols: dict[str, int] | None = None,
    normalisation: str = "softmax",
) -> Problem:
    """Query (batch, q, d), key (kv_batch, k, d), value (kv_batch, k, e) as operands 0, 1, 2, then ``extra``.

    ``score`` makes the score, or the score and the mask, from Score times 1/sqrt(qk_dim) in ``dtype``.
    """
    kv_len, v_dim, symbols = q_len if kv_len is None else kv_len, v_dim or qk_dim, symbols or {}
    kv_batch = batch if kv_batch is None else kv_batch
    indices = [index(f"b{i}") for i in range(len(batch))]
    kv_index = indices if kv_index is None else kv_index
    query = rand(*batch, q_len, qk_dim, dtype=dtype, seed=1)
    key, value = (rand(*kv_batch, kv_len, width, dtype=dtype, seed=s) for s, width in ((2, qk_dim), (3, v_dim)))
    made = score(op("mul", Score(dtype), qk_dim**-0.5))
    program, mask = made if isinstance(made, tuple) else (made, None)
    tensors = [query, key, value, *extra]
    spec = AttentionSpec(
        batch=len(batch), qk_dim=qk_dim, v_dim=v_dim, operands=tuple(Operand(t.dim(), dtype_name(t)) for t in tensors),
        query=load(query, 0, *indices, Q, D), key=load(key, 1, *kv_index, K, D), value=load(value, 2, *kv_index, K, E),
        score=program, mask=mask, extra_logits=extra_logits, weight=weight or cast(Prob(program.dtype), dtype),
        empty_row=empty_row, out_dtype=dtype, out_order=out_order or tuple(range(len(batch) + 2)), extra=tuple(symbols),
        normalisation=normalisation,
    )  # fmt: skip
    verify(spec)
    return Problem(spec, tensors, [*batch, q_len, kv_len, *symbols.values()])


def hide(
    s: Expr, predicate: Expr, fill: float = -math.inf,
    lower: Expr | None = None, upper: Expr | None = None, residual: Expr | None = None,
) -> tuple[Expr, Mask]:  # fmt: skip
    """``s`` with ``fill`` where ``predicate`` is false, and what is known about it; by default no loop bounds."""
    bounded = lower is not None or upper is not None
    residual = residual if bounded else predicate
    return op("where", predicate, s, const(fill, s.dtype)), Mask(predicate, s, lower, upper, residual, fill)


def causal_mask(s: Expr) -> tuple[Expr, Mask]:
    return hide(s, op("le", K, Q), upper=op("add", Q, 1))


def bias_read_in_two_ways() -> Problem:
    """In one way beside the mask and in another under it, as where what the mask says has simplified the place in a table."""
    table, places = rand(3, 20), torch.arange(37 * 37).reshape(37, 37) % 20

    def score(s: Expr) -> tuple[Expr, Mask]:
        under, beside = (op("add", s, load(table, 3, B1, load(places, i, Q, K))) for i in (4, 5))
        made, mask = hide(under, op("ne", op("mod", op("add", Q, K), 3), 0), -1e30)
        return made, replace(mask, visible=beside)

    return problem("float32", table, places, places.clone(), score=score)


def mapped(made: Problem) -> Problem:
    """With a map of the residual's tiles as last operand."""
    use, mask = tile_map.map_of(made.spec), made.spec.mask
    assert use is not None and mask is not None
    sizes = dict(zip(made.spec.symbols, made.sizes, strict=True))
    cells = reference.tile_map(use.tile_map, [made.operands[i] for i in use.operands], [sizes[n] for n in use.symbols])
    operands = (*made.spec.operands, Operand(cells.dim(), "uint8"))
    spec = replace(made.spec, mask=replace(mask, tiles=use.load), operands=operands)
    verify(spec)
    return Problem(spec, [*made.operands, cells], made.sizes)


def local_keys(kv_len: int) -> Problem:
    """Local attention: block b0 reads the keys 8 b0 … 8 b0 + kv_len, which overlap where these are more than 8."""
    base = problem("float32", batch=(3,), q_len=8, kv_len=kv_len)
    key, value = rand(32, 16, seed=2), rand(32, 16, seed=3)
    place = op("add", op("mul", B0, 8), K)
    spec = replace(base.spec, operands=(base.spec.operands[0], Operand(2, "float32"), Operand(2, "float32")),
                   key=load(key, 1, place, D), value=load(value, 2, place, E))  # fmt: skip
    return Problem(spec, [base.operands[0], key, value], base.sizes)


def unfolded_keys(kv_len: int) -> Problem:
    """Keys are the windows of a vector at each 8th element, which share half of it."""
    base = problem("float32", batch=(), q_len=8, kv_len=kv_len)
    operands = (base.spec.operands[0], Operand(1, "float32"), base.spec.operands[2])
    vector = rand(16 + 8 * (kv_len - 1), seed=2)
    spec = replace(base.spec, operands=operands, key=load(vector, 1, op("add", op("mul", K, 8), D)))
    return Problem(spec, [base.operands[0], vector, base.operands[2]], base.sizes)


def amid_nan(p: Problem) -> Problem:
    """Every operand of floats is a part of a tensor that holds no numbers around it."""

    def placed(t: Tensor) -> Tensor:
        around = torch.full([n + 2 for n in t.shape], math.nan, dtype=t.dtype)
        return around[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)

    return replace(p, operands=[placed(t) if t.is_floating_point() else t for t in p.operands])


def at_the_end_of_memory(p: Problem) -> Problem:
    """Behind the last byte of every operand nothing can be read: whoever does so ends the process. On Linux."""

    def placed(t: Tensor) -> Tensor:
        size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        end = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size)
        assert ctypes.CDLL(None).mprotect(end, mmap.PAGESIZE, 0) == 0
        return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape).copy_(t)

    return replace(p, operands=[placed(t) for t in p.operands])


def one_key_for_all(kv_len: int) -> Problem:
    """Every position has the same key, as where one is expanded; its gradient is a sum over them."""
    base = problem("float32", q_len=9, kv_len=kv_len)  # few queries: the key's gradient is a sum over them, here of zeros
    key = base.operands[1][:, :, :1].contiguous()
    spec = replace(base.spec, key=load(key, 1, B0, B1, const(0), D))
    return Problem(spec, [base.operands[0], key, base.operands[2]], base.sizes)


def crossed_heads() -> Problem:
    """Of four heads the first two share a key, and every second one a value."""
    base = problem("float32", batch=(2, 4), kv_batch=(2, 2), kv_index=(B0, op("floordiv", B1, 2)))
    value = load(base.operands[2], 2, B0, op("mod", B1, 2), K, E)
    return replace(base, spec=replace(base.spec, value=value))


LOWEST = {name: torch.finfo(getattr(torch, name)).min for name in expr.FLOATS}
Case = Callable[[str], Problem]
CASES: dict[str, Case] = {}
RANDOM_CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__] = make
    return make


def random_case(make: Case) -> Case:
    RANDOM_CASES[make.__name__] = make
    return make
