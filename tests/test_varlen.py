"""``varlen_attn`` is one more way to write attention: packed sequences are read, and tiles of other sequences are skipped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from programs import pass_over
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn.attention import varlen
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import fuse
from fuse.passes.read.varlen import varlen_as_products
from fuse.report.reasons import Declined, ProbabilitiesUsed

Attend = Callable[..., Any]
ENDS = (0, 70, 70, 75, 160, 190)  # the second sequence is empty
OF_KEYS = (0, 90, 96, 96, 150, 200)  # the third has no keys
TOTAL = 200  # tokens; those behind the last sequence belong to none
NEW = "seqused_k" in str(torch.ops.torch_attn._varlen_attn.default._schema)  # torch 2.11 has neither used keys nor pages


def cumulative(ends: Sequence[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


@dataclass(frozen=True)
class Packed:
    """A call of ``varlen_attn``, as arguments and as what each query sees."""

    ends: Sequence[int] = ENDS
    of_keys: Sequence[int] | None = None
    used: Sequence[int] | None = None
    window: tuple[int, int] = (-1, -1)
    heads: tuple[int, int] = (2, 2)
    scale: float | None = None
    total: int = TOTAL

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(self.total, n, 16).to(dtype) for n in (self.heads[0], self.heads[1], self.heads[1])]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cu_q = cumulative(self.ends)
        cu_k = cu_q if self.of_keys is None else cumulative(self.of_keys)
        return self.attend_to(q, k, v, cu_q, cu_k, None if self.used is None else cumulative(self.used))

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        more: dict[str, Any] = {"scale": self.scale, "window_size": self.window, "return_aux": AuxRequest(lse=True)}
        if NEW:
            more |= {"enable_gqa": True, "seqused_k": used}
        return varlen_attn(q, k, v, cu_q, cu_k, 128, 128, **more)  # type: ignore[no-any-return]

    def visible(self) -> Tensor:
        """One sequence after the other, as the documentation and FlashAttention have it."""
        of_keys = self.of_keys or self.ends
        found = torch.zeros(self.total, max(self.total, of_keys[-1]), dtype=torch.bool)
        for n in range(len(self.ends) - 1):
            first, k_first = self.ends[n], of_keys[n]
            rows = self.ends[n + 1] - first
            keys = of_keys[n + 1] - k_first if self.used is None else self.used[n]
            distance = torch.arange(keys) - (torch.arange(rows)[:, None] + keys - rows)
            left, right = (math.inf if n < 0 else n for n in self.window)
            found[first : first + rows, k_first : k_first + keys] = (distance >= -left) & (distance <= right)
        return found

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dense(q, k, v, self.visible(), self.scale)


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    score, sees = score.masked_fill(~visible, -math.inf), visible.any(-1)
    weight = score.masked_fill(~sees[:, None], 0).softmax(-1) * sees[:, None]
    return torch.einsum("hqk,khd->qhd", weight, v), score.logsumexp(-1).masked_fill(~sees, math.inf)


def compiled(program: Attend, inner: str = "aot_eager", target: str = "reference", **options: Any) -> Attend:
    return torch.compile(program, backend="fuse", options={"inner": inner, "target": target}, **options)


def gradients(program: Attend, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results, then the gradients of fixed random multiples of them."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    results = program(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).nan_to_num(posinf=0).double().sum() for x in results)
    assert isinstance(loss, Tensor)
    return [x.detach() for x in results] + list(torch.autograd.grad(loss, leaves))


def close(found: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], eps: float) -> None:
    for i, (x, e, s) in enumerate(zip(found, exact, plain, strict=True)):
        assert torch.equal(x.isinf(), e.isinf()) and not x.isnan().any(), f"number {i}"
        error, own = ((y.double() - e).nan_to_num().abs().amax() for y in (x, s))
        scale = e.masked_fill(e.isinf(), 0).abs().amax()
        allowed = 2 * own + 16 * eps * max(scale, 1)
        assert error <= allowed, f"number {i}: error {error:.3g}, allowed {allowed:.3g}"


def check(case: Packed, dtype: torch.dtype = torch.float32, train: bool = True, **options: Any) -> None:
    """Fails unless the call is read, and errs at most twice as much as the dense spelling, and a few roundings."""
    inputs = case.tensors(dtype)
    run = compiled(case.attend, **options)
    if train:
        found = gradients(run, inputs, dtype)
        exact, plain = (gradients(case.dense, inputs, d) for d in (torch.float64, dtype))
    else:
        found, exact, plain = run(*inputs), case.dense(*(x.double() for x in inputs)), case.dense(*inputs)
    (site,) = fuse.report().sites
    assert site.recovered, site.reason
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    close(found, exact, plain, torch.finfo(dtype).eps)


CASES = {
    "full": Packed(),
    "causal": Packed(window=(-1, 0)),
    "causal window": Packed(window=(20, 0)),
    "window of both sides": Packed(window=(7, 9)),
    "window ahead": Packed(window=(-1, 5)),
    "grouped queries": Packed(window=(-1, 0), heads=(4, 2)),
    "scale": Packed(scale=0.3),
    "other keys": Packed(of_keys=OF_KEYS),
    "other keys, causal": Packed(of_keys=OF_KEYS, window=(-1, 0)),
    "other keys, window": Packed(of_keys=OF_KEYS, window=(10, 3), heads=(4, 1)),
    "one sequence": Packed(ends=(0, 200), window=(-1, 0)),
    "no sequence": Packed(ends=(0,)),
}
KERNELS = ("full", "causal window", "grouped queries", "other keys, window")
USED = (17, 0, 5, 60, 30)


@pytest.mark.parametrize("name", CASES)
def test_packed_sequences_are_read_with_gradients(name: str) -> None:
    check(CASES[name])


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compute_packed_sequences_with_gradients(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, target="cpp")
    assert fuse.report().fused == 1


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("name", ["causal", "other keys, window"])
def test_triton_kernels_compute_packed_sequences_with_gradients(name: str) -> None:
    pytest.importorskip("triton", reason="no Triton on this platform")
    import triton_interpreter  # noqa: F401  mends the interpreter

    check(CASES[name], target="triton")
    assert fuse.report().fused == 1


# ---------------------------------------------------------------------------------------- in a model, of every length


class Layer(nn.Module):
    """Self-attention of packed sequences, causal, grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x: Tensor, cu_seq: Tensor, longest: int) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            more = {"enable_gqa": True} if NEW else {}
            return varlen_attn(q, k, v, cu_seq, cu_seq, longest, longest, window_size=(-1, 0), **more)  # type: ignore[no-any-return]

        return self.around(x, attend)

    def around(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 8, 16).split([4, 2, 2], 1)
        result: Tensor = self.out(attend(q, k, v).flatten(1))
        return result


@pytest.mark.compiler
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_layer_trains_with_one_kernel_for_every_length_and_number_of_sequences(inner: str) -> None:
    layer, frames = Layer(), torch._dynamo.utils.counters["frames"]
    run = compiled(layer, inner, "cpp")
    compilations = []
    for ends in ((0, 80, 200), (0, 30, 90, 91, 130), (0, 77, 99, 300)):
        x, cu_seq = torch.randn(ends[-1], 32), cumulative(ends)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(cu_seq, 0)
        case = Packed(ends, window=(-1, 0), total=ends[-1])
        expected = layer.around(x, lambda *qkv, case=case: case.dense(*qkv)[0])
        result = run(x, cu_seq, 128)
        torch.testing.assert_close(result, expected)
        weights = list(layer.parameters())
        found, exact = (torch.autograd.grad(y.square().sum(), weights) for y in (result, expected))
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        compilations.append(frames["ok"])
    assert len(set(compilations)) == 1
    assert fuse.report().fused == 1


@pytest.mark.skipif(not NEW, reason="no seqused_k in this torch")
def test_lengths_of_queries_and_of_keys_vary_without_recompiling() -> None:
    """Of tokens, sequences and pages alike."""
    run, compilations = compiled(lambda *x: Packed(window=(5, 0)).attend_to(*x)), []
    for ends, of_keys in (((0, 50, 90), (0, 70, 150)), ((0, 9, 9, 80), (0, 7, 40, 60)), ((0, 1, 2, 3, 4), (0, 9, 20, 30, 41))):
        case = Packed(ends, of_keys, [b - a - 1 for a, b in itertools.pairwise(of_keys)], (5, 0), total=ends[-1])
        q, k, v = torch.randn(ends[-1], 2, 16), *torch.randn(2, of_keys[-1], 2, 16)
        for x in (q, k, v, *(lengths := [cumulative(x) for x in (ends, of_keys, case.used or ())])):
            torch._dynamo.mark_dynamic(x, 0)
        out, _ = run(q, k, v, *lengths)
        visible = case.visible()[:, : of_keys[-1]]
        torch.testing.assert_close(out, dense(q, k, v, visible)[0])
        compilations.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert len(set(compilations)) == 1 and fuse.report().recovered == 1


@pytest.mark.skipif(not NEW, reason="tested with the torch that has it all")
def test_an_exported_program_keeps_its_sizes_open() -> None:
    class Program(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seq: Tensor) -> tuple[Tensor, Tensor]:
            return Packed(window=(-1, 0)).attend_to(q, k, v, cu_seq, cu_seq, None)

    tokens, sequences = torch.export.Dim("tokens"), torch.export.Dim("sequences")
    shapes = {name: {0: tokens} for name in "qkv"} | {"cu_seq": {0: sequences}}
    program = torch.export.export(Program(), (*Packed().tensors(), cumulative(ENDS)), dynamic_shapes=shapes)
    fused, report = fuse.transform(program)
    assert report.fused == 1
    case = Packed((0, 30, 99), window=(-1, 0), total=99)
    inputs = case.tensors()
    torch.testing.assert_close(fused.module()(*inputs, cumulative(case.ends)), case.dense(*inputs))


# ------------------------------------------------------------------------------------------------- tiles are skipped


def test_the_report_tells_tables_of_one_tensor_apart() -> None:
    compiled(lambda q, k, v, cu: varlen_attn(q, k, v, cu, cu, 90, 90))(*Packed().tensors(), cumulative(ENDS))
    assert [site.mask for site in fuse.report().sites] == ["k >= cu[q] and k < cu'[q]"]


def test_calls_of_one_packing_share_its_tables() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        once = varlen_attn(q, k, v, cu, cu, 90, 90)
        return varlen_attn(once, k, v, cu, cu, 90, 90)  # type: ignore[no-any-return]

    passed = pass_over(program, *Packed().tensors(), cumulative(ENDS))
    assert len(passed.calls) == 2
    assert len(passed.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cummax.default)) == 2


@pytest.mark.parametrize("name", CASES)
def test_tiles_of_other_sequences_lie_outside_of_bounds_and_nothing_is_left_to_ask(name: str) -> None:
    mask = pass_over(CASES[name].attend, *CASES[name].tensors()).spec.mask
    assert mask is not None and mask.residual is None and mask.lower is not None and mask.upper is not None


@pytest.mark.compiler
def test_keys_of_other_sequences_are_not_read() -> None:
    """Those of the last of five sequences are NaN, which would show in the first, that shares no tile with it."""
    n = 256
    cu_seq = cumulative(range(0, 6 * n, n))
    q, k, v = (torch.randn(5 * n, 2, 16) for _ in range(3))
    k[4 * n :], v[4 * n :] = math.nan, math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = compiled(lambda *x: varlen_attn(*x, cu_seq, cu_seq, n, n), target="cpp")(*inputs)
    for x in (out, *torch.autograd.grad(out[:n].sum(), inputs)):
        assert x[:n].isfinite().all()
    assert out[4 * n :].isnan().all()


# ------------------------------------------------------------------------------------------------- used keys and pages


@pytest.mark.skipif(not NEW, reason="no seqused_k in this torch")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (9, 4)])
def test_of_each_sequence_as_many_keys_as_are_used_are_seen(window: tuple[int, int]) -> None:
    check(Packed(of_keys=OF_KEYS, used=(17, 0, 0, 50, 30), window=window), train=False)


@dataclass(frozen=True)
class Paged:
    """A cache in pages of 8: what is behind the used positions is NaN, and what is behind the used pages lies outside."""

    ends: Sequence[int]
    used: Sequence[int] = (13, 0, 24, 9)
    pages: Sequence[Sequence[int]] = ((0, 3, -1), (-1, 77, -5), (4, 5, 7), (2, 1, 99))
    window: tuple[int, int] = (-1, 0)
    tensors: list[Tensor] = field(default_factory=lambda: [torch.randn(40, 4, 16), *(torch.randn(9, 8, 2, 16) for _ in "kv")])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        more = {"seqused_k": cumulative(self.used), "block_table": torch.tensor(self.pages, dtype=torch.int32)}
        cu_seq = cumulative(self.ends)
        return varlen_attn(  # type: ignore[no-any-return]
            q, k, v, cu_seq, cu_seq, 24, 24, window_size=self.window, enable_gqa=True, return_aux=AuxRequest(lse=True), **more
        )

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The used positions, one sequence after the other."""
        places = [(pages[i // 8], i % 8) for pages, used in zip(self.pages, self.used, strict=True) for i in range(used)]
        k, v = (torch.stack([x[place] for place in places]) for x in (k, v))
        bounds = [0, *torch.tensor(self.used).cumsum(0).tolist()]
        visible = Packed(self.ends, bounds, window=self.window, total=len(q)).visible()[:, : len(places)]
        return dense(q, k, v, visible)


@pytest.mark.skipif(not NEW, reason="no block_table in this torch")
@pytest.mark.parametrize("ends", [(0, 1, 2, 3, 4), (0, 5, 5, 17, 20)], ids=["one query", "several"])
@pytest.mark.parametrize("target", ["reference", pytest.param("cpp", marks=pytest.mark.compiler)])
def test_a_cache_in_pages_is_read(ends: Sequence[int], target: str) -> None:
    case = Paged(ends)
    q, k, v = case.tensors
    q = q[: ends[-1]]
    for pages, used in zip(case.pages, case.used, strict=True):
        if used % 8:
            k[pages[used // 8], used % 8 :] = v[pages[used // 8], used % 8 :] = math.nan
    found = compiled(case.attend, target=target)(q, k, v)
    (site,) = fuse.report().sites
    assert site.recovered, site.reason
    close(found, case.plain(q.double(), k.double(), v.double()), case.plain(q, k, v), torch.finfo(torch.float32).eps)


@pytest.mark.skipif(not NEW, reason="no block_table in this torch")
def test_as_many_pages_as_sequences_are_read_where_both_may_vary() -> None:
    """Sizes that are equal are one size to torch.compile, of which the graph has the square."""
    case = Paged((0, 1, 2, 3, 4), pages=((0, 3, -1, 0), (-1, 77, -5, 0), (4, 5, 7, 0), (2, 1, 99, 0)))
    q, k, v = case.tensors
    lengths, used, pages = cumulative(case.ends), cumulative(case.used), torch.tensor(case.pages, dtype=torch.int32)

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(  # type: ignore[no-any-return]
            q, k, v, lengths, lengths, 1, 24, window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=pages
        )

    out = compiled(program, dynamic=True)(q[:4], k, v)
    assert [site.reason for site in fuse.report().sites] == [None]
    torch.testing.assert_close(out, case.plain(q[:4], k, v)[0])


# --------------------------------------------------------------------------------------- where it goes, what is declined


@pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="not in this torch")
def test_a_result_may_be_written_into_a_tensor_that_is_given() -> None:
    case, lengths = Packed(window=(-1, 0)), cumulative(ENDS)

    def program(out: Tensor, q: Tensor, k: Tensor, v: Tensor, longest: int) -> Tensor:
        varlen.varlen_attn_out(out, q, k, v, lengths, lengths, longest, longest, window_size=(-1, 0))
        return out * 2

    inputs, run = case.tensors(), compiled(program)
    for longest in (85, 90, 95):
        out = torch.empty(TOTAL, 2, 16)
        result = run(out, *inputs, longest)
        torch.testing.assert_close(out, case.dense(*inputs)[0])
        assert torch.equal(result, 2 * out)
    assert len(fuse.report().sites) == 2 and fuse.report().recovered == 2  # the length is a symbol from the second on


@pytest.mark.parametrize("name", ["varlen_attn", "varlen_attn_out"])
def test_what_is_declined_runs_as_before(name: str) -> None:
    """Keys without their lengths; there is no kernel of torch for it on CPUs, and torch says so."""
    function = getattr(varlen, name, None) or pytest.skip("not in this torch")
    q, k, v = Packed().tensors()
    given = (torch.empty_like(q),) if name.endswith("_out") else ()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        compiled(lambda *x: function(*given, *x, cumulative(ENDS), None, 128, 128))(q, k, v)
    (site,) = fuse.report().sites
    assert not site.recovered and ("cu_seq_k" in str(site.reason) or "_varlen_attn_out" in str(site.reason))


def test_the_result_alone_is_read_where_nobody_asks_for_the_log_sum_exp() -> None:
    check_result = compiled(lambda *x: Packed().attend(*x)[0])(*(inputs := Packed().tensors()))
    torch.testing.assert_close(check_result, Packed().dense(*inputs)[0])


def test_autocast_is_not_for_it() -> None:
    """The operator has no rule for it: float32 stays what it is."""
    inputs = Packed().tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = compiled(Packed().attend)(*inputs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, Packed().dense(*inputs)[0])


def test_a_log_sum_exp_that_is_read_before_the_result_leaves_the_call_as_it_was() -> None:
    """Dynamo takes results in their order, a tracer as the model does."""

    def model(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        results = torch.ops.torch_attn._varlen_attn(q, k, v, ends, ends, 128, 128, False)
        weight = results[1].exp()
        return results[0], weight

    traced = symbolic_trace(model)
    fused, report = fuse.transform(traced, *Packed().tensors(), cumulative(ENDS))
    assert [type(site.reason) for site in report.sites] == [ProbabilitiesUsed]
    assert [n.target for n in fused.graph.nodes if n.op != "call_module"] == [n.target for n in traced.graph.nodes]


@pytest.mark.parametrize(("given", "read"), [({"num_splits": 2}, True), ({"backend": 1}, True), ({"unheard_of": 1}, False)])
def test_what_only_says_how_it_is_computed_is_no_matter(given: dict[str, Any], read: bool) -> None:
    """From torch 2.15 on the operator is told which of torch's kernels computes it."""
    ends = cumulative(ENDS)
    tensors = dict(zip(("query", "key", "value"), Packed().tensors(), strict=True))
    if read:
        assert varlen_as_products(**tensors, cu_seq_q=ends, cu_seq_k=ends, **given)[0].shape == tensors["query"].shape
    else:
        with pytest.raises(Declined, match="unheard_of"):
            varlen_as_products(**tensors, cu_seq_q=ends, cu_seq_k=ends, **given)
