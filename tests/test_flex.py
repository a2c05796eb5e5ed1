"""FlexAttention is one more way to write attention: its score functions, masks and lists of blocks are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, create_mask, flex_attention

import fuse

N = 200
Q, K = torch.arange(N)[:, None], torch.arange(N)
Attend = Callable[..., Any]
LENGTHS = torch.tensor([150, 90])  # of two texts; then nothing is seen
PADDED = create_block_mask(lambda b, h, q, k: (q < LENGTHS[b]) & (k < LENGTHS[b]), 2, None, N, N, device="cpu")


def heads(batch: int, count: int, length: int, dim: int = 16) -> list[Tensor]:
    return [torch.randn(batch, count, length, dim) for _ in range(3)]


def compiled(program: Attend, inner: str = "aot_eager", target: str = "reference", dynamic: bool | None = None) -> Attend:
    return torch.compile(program, backend="fuse", options={"inner": inner, "target": target}, dynamic=dynamic)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def gradients(program: Attend, inputs: Sequence[Tensor], learned: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results, then the gradients of fixed random multiples of them."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    results = program(*leaves)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).nan_to_num(neginf=0).double().sum() for x in results)
    assert isinstance(loss, Tensor)
    return [x.detach() for x in results] + list(torch.autograd.grad(loss, [*leaves, *learned]))


def check(program: Attend, plain: Attend, inputs: Sequence[Tensor], learned: Sequence[Tensor] = (), **options: Any) -> None:
    """Fails unless every attention is read, and errs at most twice as much as the plain spelling, and a few roundings."""
    found = gradients(compiled(program, **options), inputs, learned, torch.float32)
    sites = fuse.report().sites
    assert sites and all(site.recovered for site in sites), [str(site.reason) for site in sites]
    eager, exact = (gradients(plain, inputs, learned, dtype) for dtype in (torch.float32, torch.float64))
    for i, (x, e, s) in enumerate(zip(found, exact, eager, strict=True)):
        assert torch.equal(x.isinf(), e.isinf())
        error, own = ((y.double() - e).nan_to_num().abs().amax() for y in (x, s))
        scale = e.double().masked_fill(e.isinf(), 0).abs().amax()
        allowed = 2 * own + 16 * torch.finfo(torch.float32).eps * max(scale, 1)
        assert error <= allowed, f"number {i}: error {error:.3g}, allowed {allowed:.3g}"


# -------------------------------------------------------------------------------------------------------- attn-gym


def test_every_mask_of_attention_gym_is_read() -> None:
    gym = pytest.importorskip("attention_gym", reason="no attn-gym")
    masks = [gym.block_mask(name) for name in gym.MASKS]
    dense = [create_mask(mask, gym.BATCH, gym.HEADS, gym.LENGTH, gym.LENGTH, device="cpu") for mask in gym.MASKS.values()]

    def program(*x: Tensor) -> list[Tensor]:
        return [flex_attention(*x[3 * i : 3 * i + 3], block_mask=mask) for i, mask in enumerate(masks)]

    def plain(*x: Tensor) -> list[Tensor]:
        return [attention(*x[3 * i : 3 * i + 3], mask) for i, mask in enumerate(dense)]

    check(program, plain, [x for _ in masks for x in heads(gym.BATCH, gym.HEADS, gym.LENGTH)], inner="eager")


def test_every_score_function_of_attention_gym_is_read() -> None:
    gym = pytest.importorskip("attention_gym", reason="no attn-gym")
    mods = gym.MODS
    index = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)])
             for d, n in enumerate((gym.BATCH, gym.HEADS, gym.LENGTH, gym.LENGTH))]  # fmt: skip

    def program(*x: Tensor) -> list[Tensor]:
        return [flex_attention(*x[3 * i : 3 * i + 3], score_mod=mod) for i, mod in enumerate(mods.values())]

    def plain(*x: Tensor) -> list[Tensor]:
        found = []
        for i, (name, mod) in enumerate(mods.items()):
            q, k, v = x[3 * i : 3 * i + 3]
            score = q @ k.mT / 4
            if name == "latent":  # torch.dot takes vectors
                rope_k, rope_q = gym.learned(mod)  # in the order of their names
                score = score + rope_q @ rope_k.mT
            else:
                score = mod(score, *index)
            found.append(score.softmax(-1) @ v)
        return found

    learned = [x for mod in mods.values() for x in gym.learned(mod)]
    check(program, plain, [x for _ in mods for x in heads(gym.BATCH, gym.HEADS, gym.LENGTH)], learned, inner="eager")


# ----------------------------------------------------------------------------------------------- what a mask is made of


def test_a_block_counts_as_it_is_listed_whatever_the_mask_says() -> None:
    """Listed as full, in part, both, or not at all; behind what counts a list holds anything."""
    counts, lists = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 7], [1, 0]]]])
    full_counts, full_lists = torch.tensor([[[1, 0]]]), torch.tensor([[[[1, 9], [0, 0]]]])
    mask = BlockMask.from_kv_blocks(
        *(x.int() for x in (counts, lists, full_counts, full_lists)), BLOCK_SIZE=(128, 100), mask_mod=causal,
        seq_lengths=(N, N),
    )  # fmt: skip
    seen = torch.where(Q < 128, K >= 100, Q >= K)
    check(lambda *x: flex_attention(*x, block_mask=mask), lambda *x: attention(*x, seen), heads(1, 2, N), inner="eager")


def test_masks_made_in_the_graph_are_read_for_every_length() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (document[b, q] == document[b, k]) & (q >= k)

        length = document.shape[1]
        return flex_attention(q, k, v, block_mask=create_block_mask(same, 2, None, length, length, device="cpu"))

    run = compiled(program, dynamic=True)
    for length in (N, 140):
        document, x = torch.randint(0, 3, (2, length)).sort()[0], heads(2, 2, length)
        seen = (document[:, None, :, None] == document[:, None, None]) & (Q >= K)[:length, :length]
        torch.testing.assert_close(run(*x, document), attention(*x, seen))
    assert [site.recovered for site in fuse.report().sites] == [True]


def test_a_mask_that_is_an_argument_is_read_for_every_length() -> None:
    """Sizes of its blocks are numbers of the mask, not sizes that a kernel knows nothing of."""
    run = compiled(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask), dynamic=True)
    for length in (N, 140):
        x, mask = heads(2, 2, length), create_block_mask(causal, None, None, length, length, device="cpu", BLOCK_SIZE=32)
        torch.testing.assert_close(run(*x, mask), attention(*x, (Q >= K)[:length, :length]))
    (site,) = fuse.report().sites
    assert site.mask == "kv_indices[q // 32, k // 32] == 2 or kv_indices[q // 32, k // 32] == 1 and k <= q"


def test_a_mask_for_another_number_of_heads_is_declined() -> None:
    mask = create_block_mask(causal, 1, 2, N, N, device="cpu")
    compiled(lambda *x: flex_attention(*x, block_mask=mask))(*heads(1, 4, N))
    (site,) = fuse.report().sites
    assert "BlockMask of (1, 2)" in str(site.reason)


# ------------------------------------------------------------------------------------------------ results and training


def test_the_log_sum_exp_has_a_gradient_and_rows_that_see_nothing_have_none() -> None:
    """Attention sinks as transformers writes them: the result times sigmoid(log-sum-exp - sink)."""
    sinks = nn.Parameter(torch.randn(4))
    inside = (LENGTHS[:, None, None, None] > Q) & (LENGTHS[:, None, None, None] > K)

    def with_sinks(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out * torch.sigmoid(lse - sinks[:, None])[..., None], lse

    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kv = k[:, :2], v[:, :2]
        out, aux = flex_attention(q, *kv, block_mask=PADDED, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return with_sinks(out, aux.lse)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        sees = (inside.any(-1)).expand(2, 4, N)
        score = (q @ k.mT / 4).masked_fill(~(inside | ~sees[..., None]), -math.inf)
        lse = torch.where(sees, score.logsumexp(-1), -math.inf)
        return with_sinks(attention(q, k, v, inside), lse)

    check(program, plain, heads(2, 4, N), [sinks])


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(("inner", "dynamic"), [("aot_eager", None), ("inductor", None), ("eager", True)])
def test_the_largest_score_of_each_row_is_given_beside_the_result_and_has_no_gradient(
    lse: bool, inner: str, dynamic: bool | None
) -> None:
    """Which no other backend has on CPUs. Optimisers that clip queries and keys by it ask for it."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        asked = AuxRequest(lse=lse, max_scores=True)
        out, aux = flex_attention(q, k[:, :2], v[:, :2], cap, PADDED, enable_gqa=True, return_aux=asked)
        return (out, aux.max_scores, *([aux.lse] if lse else []))

    def cap(s: Tensor, *at: Tensor) -> Tensor:
        return 5 * torch.tanh(s / 5)

    x = [t.requires_grad_() for t in heads(2, 4, N)]
    out, largest, *rest = compiled(program, inner, dynamic=dynamic)(*x)
    (site,) = fuse.report().sites
    assert site.recovered and not largest.requires_grad and largest.dtype == torch.float32
    inside = (LENGTHS[:, None, None, None] > Q) & (LENGTHS[:, None, None, None] > K)
    k, v = (t[:, :2].repeat_interleave(2, 1) for t in x[1:])
    score, sees = cap(x[0] @ k.mT / 4), inside.any(-1, keepdim=True)
    seen = score.masked_fill(~inside, -math.inf)
    torch.testing.assert_close(largest, seen.amax(-1).detach())
    if lse:
        torch.testing.assert_close(rest[0], seen.logsumexp(-1))
    expected = torch.where(sees, score.masked_fill(~inside & sees, -math.inf).softmax(-1) @ v, 0)
    for got, grad in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, grad)


def test_other_backends_refuse_the_largest_score_on_cpus_as_before() -> None:
    run = torch.compile(lambda *x: flex_attention(*x, return_aux=AuxRequest(max_scores=True)), backend="eager")
    with pytest.raises(Exception, match="max scores is not supported on CPU"):
        run(*heads(1, 4, N))


def test_what_is_left_to_inductor_says_why_it_has_no_largest_score() -> None:
    mask = create_block_mask(causal, 1, 2, N, N, device="cpu")
    run = compiled(lambda *x: flex_attention(*x, block_mask=mask, return_aux=AuxRequest(max_scores=True)), "inductor")
    with pytest.raises(Exception, match=r"does not support the maximum.*fuse left it, since a BlockMask of \(1, 2\)"):
        run(*heads(1, 4, N))


@pytest.mark.compiler
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_it_trains_on_cpus(inner: str) -> None:
    """As nothing in PyTorch does: pytorch#148752."""
    table = nn.Parameter(torch.randn(64, 2))
    mask = create_block_mask(causal, None, None, N, N, device="cpu")

    def learned(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + table[torch.clamp(q - k, -32, 31) + 32, h]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = table[torch.clamp(Q - K, -32, 31) + 32].permute(2, 0, 1)
        return (q @ k.mT / 4 + bias).masked_fill(Q < K, -math.inf).softmax(-1) @ v

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=learned, block_mask=mask)

    check(program, plain, heads(1, 2, N), [table], inner=inner, target="cpp")
    assert fuse.report().fused == 1


def test_other_backends_refuse_to_train_on_cpus_as_before() -> None:
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        torch.compile(flex_attention, backend="eager")(*(x.requires_grad_() for x in heads(1, 1, 16)))


def test_what_is_left_to_inductor_says_why_it_does_not_train() -> None:
    mask = create_block_mask(causal, 1, 2, N, N, device="cpu")
    with pytest.raises(Exception, match=r"does not support the backward.*fuse left it, since a BlockMask of \(1, 2\)"):
        compiled(lambda *x: flex_attention(*x, block_mask=mask), "inductor")(*(x.requires_grad_() for x in heads(1, 4, N)))


def test_training_is_refused_as_by_torch_where_fuse_is_disabled() -> None:
    run = torch.compile(flex_attention, backend="fuse", options={"disable": True})
    with pytest.raises(Exception, match="does not support the backward of FlexAttention on CPU"):
        run(*(x.requires_grad_() for x in heads(1, 1, 16)))


def test_results_lie_in_memory_as_eager_s_do() -> None:
    """The result has the query's order of dimensions, which ``view`` relies on; so has that of SDPA."""

    def program(x: Tensor, attend: Attend) -> Tensor:
        q, k, v = x.view(2, N, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return attend(q, k, v).transpose(1, 2).view(2, N, 16)

    x = torch.randn(2, N, 48)
    for attend in (flex_attention, nn.functional.scaled_dot_product_attention):
        torch.testing.assert_close(compiled(program)(x, attend), program(x, attention))
    assert all(site.recovered for site in fuse.report().sites)
