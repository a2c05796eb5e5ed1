"""What Dynamo hands to a backend has traps, G1 to G20 in the order in which they were found; each is a program here.

G2, G17 and G19 are about interfaces that fuse does not use: functionalisation before dispatch, register_autograd, and
Inductor's own gradients through nested_compile_region.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from spellings import check, composites, near_misses, qkv, rand, regions  # noqa: F401  (their programs register themselves)
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn import functional as F

import fuse
from fuse import passes
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.read.graph import location


def compiled(program: Callable[..., Any], inner: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(program, backend="fuse", options={"inner": inner, "target": "reference"}, **options)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v


class StraightThrough(torch.autograd.Function):
    """Rounds forward, passes gradients through backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_g1_a_custom_backward_beside_the_attention_survives() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(StraightThrough.apply(q), k, v)

    (expected,) = torch.autograd.grad(program(q, k, v).sum(), q)
    (found,) = torch.autograd.grad(compiled(program)(q, k, v).sum(), q)
    torch.testing.assert_close(found, expected)


def test_g1_a_custom_function_does_not_keep_the_attention_from_being_fused() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(StraightThrough.apply(q), k, v)

    with torch.no_grad():
        torch.testing.assert_close(compiled(program)(*qkv()), program(*qkv()))
    assert fuse.report().recovered == 1


def test_g3_a_mask_built_by_vmap_is_batched() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(9)
        keep = torch.vmap(torch.vmap(lambda q, k: k <= q, in_dims=(None, 0)), in_dims=(0, None))(i, i)
        return (q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1) @ v

    torch.testing.assert_close(compiled(program)(*qkv()), program(*qkv()))
    assert fuse.report().recovered == 1


@pytest.mark.parametrize(
    "name",
    [
        "regions.autocast_inplace_addition",  # G4: bfloat16 += float32 is no addition out of place
        "regions.autocast_inside",  # G5: what autocast casts differs between devices
        "regions.autocast_off_for_the_scores",  # G6: each node has its own autocast state
        "regions.softmax_under_no_grad_values_outside",  # G6: and grad mode must be one
        "regions.query_mutated_after_use",  # G11: written between its use and the insertion
        "regions.query_mutated_before_the_values",
        "regions.output_written_into_a_buffer",  # G10: out=
        "regions.in_a_branch",  # G16: no autograd inside the op, so that cond can hold it
        "near_misses.router",  # G20: a softmax is not yet an attention
        "near_misses.classifier",
        "near_misses.linear_attention",
    ],
)
def test_spellings_of_the_traps(name: str) -> None:
    check(name, inner="aot_eager")


def test_g5_dtypes_of_the_spec_are_those_that_autocast_gave() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(q, k, v)

    assert compiled(program)(*qkv()).dtype == torch.bfloat16
    (site,) = fuse.report().sites
    assert site.spec is not None and site.spec.out_dtype == "bfloat16"
    assert site.spec.score.dtype == attend(*qkv(dtype=torch.bfloat16)).dtype.__str__().removeprefix("torch.")


def test_g5_ambient_autocast_is_seen() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compiled(attend)(*qkv()), attend(*qkv())
    assert fuse.report().recovered == 1 and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


class Scaled(nn.Module):
    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (3, 16)).transpose(1, 2)
        p = ((x @ x.mT) * self.scale).softmax(-1)
        return F.dropout(p, self.dropout, self.training) @ x


def test_g7_python_floats_that_become_symbols_are_read() -> None:
    x = rand(2, 9, 48)
    for scale in (0.25, 0.5):
        model = Scaled(scale, 0.1).eval()
        torch.testing.assert_close(compiled(model, dynamic=True)(x), model(x))
    assert fuse.report().recovered == 2


def test_g8_triangles_in_place_with_symbolic_sizes() -> None:
    def program(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (3, 16)).transpose(1, 2)
        hidden = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu_(1)
        return (x @ x.mT).masked_fill_(hidden, -torch.inf).softmax(-1) @ x

    run = compiled(program, dynamic=True)
    for length in (9, 12):
        x = rand(2, length, 48)
        torch.testing.assert_close(run(x), program(x))
    assert fuse.report().recovered == 1


def test_g8_no_size_is_fixed_for_what_may_be_no_attention() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).sigmoid() @ v

    run = compiled(program, dynamic=True)
    for features in (4, 6):
        x = (rand(2, 3, 64, features), rand(2, 3, 80, features, seed=1), rand(2, 3, 80, features, seed=2))
        torch.testing.assert_close(run(*x), program(*x))
    assert fuse.report().graphs == 1


def test_g9_metadata_changed_in_place() -> None:
    """Dynamo's example value of ``k`` shows the shape at the end."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        s = q @ k.mT
        k.transpose_(-1, -2)
        return (s + (q @ k)).softmax(-1) @ v

    torch.testing.assert_close(compiled(program)(*qkv()), program(*qkv()))


def test_g10_pure_operators_with_the_names_of_mutations() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(9)
        keep = (i[None] <= i[:, None]) & (i[:, None] - i < 4) | (i == 0)
        return (q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1) @ v

    torch.testing.assert_close(compiled(program)(*qkv()), program(*qkv()))
    assert fuse.report().recovered == 1


def test_g10_mutations_that_do_not_look_like_one() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        s = q @ k.mT
        F.relu(s, inplace=True)
        keep &= torch.ones(9, 9, dtype=torch.bool).tril()
        torch.mul(s, 0.5, out=s)
        return s.masked_fill(~keep, -torch.inf).softmax(-1) @ v

    def keep() -> Tensor:
        return torch.ones(9, 9, dtype=torch.bool).triu(-2)

    torch.testing.assert_close(compiled(program)(*qkv(), keep()), program(*qkv(), keep()))


def test_g11_a_static_cache_is_read_after_it_was_written() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        cache.index_copy_(2, position, k)
        out = (q @ cache.mT).softmax(-1) @ v
        position.add_(1)
        return out

    def inputs() -> tuple[Tensor, ...]:
        q, k, v = qkv((2, 3, 1, 16), kv=9)
        return q, k[:, :, :1], v, rand(2, 3, 9, 16, seed=5), torch.tensor([4])

    first, second = inputs(), inputs()
    torch.testing.assert_close(compiled(program)(*first), program(*second))
    torch.testing.assert_close(first, second)


def test_g12_dead_code_is_removed_but_not_what_is_written_in_place() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
        s = q @ k.mT
        log.add_(1)  # nobody reads its result
        s.masked_fill_(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        return s.softmax(-1) @ v

    for inner in ("eager", "aot_eager"):
        log = torch.zeros(1)
        torch.testing.assert_close(compiled(program, inner)(*qkv(), log), program(*qkv(), torch.zeros(1)))
        assert log.item() == 1


def test_g13_a_graph_that_was_rewritten_can_come_again() -> None:
    found: list[int] = []

    def twice(gm: GraphModule, example_inputs: Any) -> Any:
        found.extend(sum(site.fused for site in passes.run(gm, lambda device: "reference").sites) for _ in range(2))
        return gm.forward

    torch.testing.assert_close(torch.compile(attend, backend=twice)(*qkv()), attend(*qkv()))
    assert found == [1, 0]


class RelativeBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.bias, self.out = nn.Linear(16, 16), nn.Parameter(rand(9, 9)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return self.out((q @ x.mT + self.bias).softmax(-1) @ x)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_g14_graphs_that_ddp_splits_run_as_they_did() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, x = RelativeBias(), rand(2, 9, 16, seed=3)
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        expected = torch.autograd.grad(model(x).sum(), model.bias)
        found = torch.autograd.grad(compiled(wrapped)(x).sum(), model.bias)
        torch.testing.assert_close(found, expected)
    finally:
        torch.distributed.destroy_process_group()


class Tagged(Tensor):
    """A subclass without any behaviour of its own."""


def test_g15_inputs_of_a_tensor_subclass_are_left_alone() -> None:
    q, k, v = (x.as_subclass(Tagged) for x in qkv())
    torch.testing.assert_close(compiled(attend, "eager")(q, k, v).as_subclass(Tensor), attend(*qkv()))
    (site,) = fuse.report().sites
    assert not site.recovered
    assert str(site.reason) == "k is a Tagged: a subclass of Tensor may give every operation another meaning"


def test_g16_a_nested_compile_region_holds_the_op() -> None:
    region = torch.compiler.nested_compile_region(attend)

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return region(region(q, k, v), k, v)

    with torch.no_grad():
        torch.testing.assert_close(compiled(program)(*qkv()), program(*qkv()))


@pytest.mark.parametrize("caret", ["", "    ^^^^^^^^^^\n"])
def test_g18_locations_are_read_with_and_without_a_line_of_carets(caret: str) -> None:
    node = Graph().placeholder("x")
    node.stack_trace = (
        f'  File "/a/outer.py", line 3, in run\n    f(x)\n{caret}  File "/a/model.py", line 12, in f\n    s @ v\n{caret}'
    )
    assert location(node) == "model.py:12"


def test_where_is_the_line_of_the_users_source() -> None:
    compiled(attend)(*qkv())
    (site,) = fuse.report().sites
    assert site.where == f"{os.path.basename(__file__)}:{attend.__code__.co_firstlineno + 1}"


def test_a_spec_that_a_pass_broke_is_refused_by_the_name_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(lifted: Lifted, _: SiteContext) -> Lifted:
        return replace(lifted, spec=replace(lifted.spec, empty_row="seven"))

    monkeypatch.setattr(passes, "PASSES", (*passes.PASSES, break_it))
    q = torch.randn(1, 2, 9, 16)
    attend = torch.compile(lambda x: (x @ x.mT).softmax(-1) @ x, backend="fuse", options={"inner": "eager"})
    torch.testing.assert_close(attend(q), (q @ q.mT).softmax(-1) @ q)
    (site,) = fuse.report().sites
    assert not site.fused and "after break_it: empty_row 'seven'" in str(site.reason)
