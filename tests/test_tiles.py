"""Maps of tiles for masks that are tensors: right, shared, kept no longer than they hold, and worth it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from programs import pass_over
from torch import Tensor

from fuse import targets
from fuse.ir import tile_map
from fuse.ir.expr import Expr, Load, apply, const, index
from fuse.ir.spec import Operand
from fuse.ir.tile_map import EMPTY, FULL, PARTIAL, TileMap
from fuse.ops import tile_map as map_op
from fuse.ops.buffer_cache import _results, cached
from fuse.targets import MapKernel, reference
from fuse.targets.cpp.compiler import instruction_set
from fuse.targets.cpp.launch import CppTileMap, build_tile_map

N = 300
ISAS = ["avx512", "avx2"] if instruction_set().startswith(("avx512", "amx")) else [instruction_set()]


def heads() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, N, 8)
    return query, key, value


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v


def two_layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend(attend(q, k, v, mask), k, v, mask)


def maps(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in graph.graph.nodes if n.target is torch.ops.fuse.tile_map.default]


def _map(dtype: str) -> TileMap:
    """The positive elements of a tensor (b0, q, k)."""
    load = Load(dtype, 0, (index("b0"), index("q"), index("k")))
    positive: Expr = load if dtype == "bool" else apply("gt", load, const(0, dtype), dtype="bool")
    return TileMap(1, (Operand(3, dtype),), positive)


def _expected(mask: Tensor) -> Tensor:
    """The classes, cell by cell."""
    rows = [block.split(tile_map.KEYS, -1) for block in mask.split(tile_map.ROWS, -2)]
    classes = [[torch.where(c.all((-1, -2)), FULL, torch.where(c.any((-1, -2)), PARTIAL, EMPTY)) for c in row] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in classes], -2).byte()


def test_one_map_serves_all_layers_that_read_the_mask() -> None:
    assert len(maps(pass_over(two_layers, *heads(), torch.ones(N, N, dtype=torch.bool).tril()).graph)) == 1


def test_different_masks_have_different_maps() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return attend(attend(q, k, v, a), k, v, b)

    ones = torch.ones(N, N, dtype=torch.bool)
    assert len(maps(pass_over(program, *heads(), ones.tril(), ones.triu()).graph)) == 2


def test_a_mask_per_batch_index_has_a_map_for_each_but_not_for_heads() -> None:
    mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    (node,) = maps(pass_over(attend, *heads(), mask).graph)
    sizes = node.args[1]
    assert sizes == [N, N]  # the batch is one, and heads do not appear


def test_small_calls_have_no_map() -> None:
    q, k, v = heads()
    mask = torch.ones(N, N, dtype=torch.bool)
    assert not maps(pass_over(attend, q[..., :1, :], k, v, mask[:1]).graph)
    few_queries, few_keys = heads()[0][..., :5, :], torch.ones(5, 3 * N, dtype=torch.bool)
    assert not maps(pass_over(attend, few_queries, *(x.repeat(1, 1, 3, 1) for x in (k, v)), few_keys).graph)


def test_what_is_read_from_no_tensor_of_both_positions_has_no_map() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        return attend(q, k, v, document[:, None] == document)

    assert not maps(pass_over(program, *heads(), torch.arange(N) // 50).graph)


def test_a_table_of_large_blocks_has_no_map_and_one_of_smaller_ones_has() -> None:
    """Tiles are no larger than 128: the table itself tells which can be skipped."""
    for size, expected in ((128, 0), (100, 1)):

        def program(q: Tensor, k: Tensor, v: Tensor, table: Tensor, size: int = size) -> Tensor:
            i = torch.arange(N) // size
            return attend(q, k, v, table[i[:, None], i])

        assert len(maps(pass_over(program, *heads(), torch.ones(3, 3, dtype=torch.bool).tril()).graph)) == expected


def tril_but_for_one(diagonal: int = 0) -> Tensor:
    """No formula."""
    mask = torch.ones(N, N, dtype=torch.bool).tril(diagonal)
    mask[2, 1] = False
    return mask


class Buffered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", tril_but_for_one())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.mask)


def test_a_buffers_map_is_made_again_only_when_the_buffer_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    original = map_op._kernel
    monkeypatch.setattr(map_op, "_kernel", lambda *key: lambda *call: made.append(call) or original(*key)(*call))
    targets.reset()
    module, inputs = Buffered(), heads()
    compiled = torch.compile(module, backend="fuse", options={"target": "reference", "inner": "eager"})
    with torch.no_grad():
        compiled(*inputs), compiled(*inputs)
        assert len(made) == 1
        module.mask.copy_(torch.ones(N, N, dtype=torch.bool).triu())
        assert torch.allclose(compiled(*inputs), module(*inputs), atol=1e-5)
        assert len(made) == 2
        module.mask = tril_but_for_one(1)
        assert torch.allclose(compiled(*inputs), module(*inputs), atol=1e-5)


class HalfBuffered(Buffered):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return attend(q, k, v, self.mask & given)


def test_a_map_of_a_buffer_and_an_input_is_not_kept() -> None:
    targets.reset()
    compiled = torch.compile(HalfBuffered(), backend="fuse", options={"target": "reference", "inner": "eager"})
    with torch.no_grad():
        compiled(*heads(), torch.ones(N, N, dtype=torch.bool))
    assert not _results


def test_buffers_that_are_views_of_one_storage_have_a_map_each() -> None:
    ones = torch.ones(N, N, dtype=torch.bool)
    for mask in torch.stack((ones.tril(), ones.triu())):
        made = cached([mask], "positive", lambda mask=mask: reference.tile_map(_map("bool"), [mask[None]], [1, N, N]))
        assert torch.equal(made, _expected(mask[None]))


def test_an_inputs_map_is_made_for_every_call() -> None:
    compiled = torch.compile(attend, backend="fuse", options={"target": "reference", "inner": "eager"})
    inputs, mask = heads(), torch.ones(N, N, dtype=torch.bool).tril()
    with torch.no_grad():
        assert torch.allclose(compiled(*inputs, mask), attend(*inputs, mask), atol=1e-5)
        mask.untyped_storage().copy_(torch.ones(N, N, dtype=torch.bool).tril(9).untyped_storage())  # leaves no trace
        assert torch.allclose(compiled(*inputs, mask), attend(*inputs, mask), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 33, 130), (1, 16, 64), (1, 1, 1), (2, 100, 700), (1, 5, 1000)])
def test_the_references_map_says_what_the_cells_hold(shape: tuple[int, int, int]) -> None:
    data = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.999).cumprod(-1)
    mask = data.bool()
    assert torch.equal(reference.tile_map(_map("bool"), [mask], list(shape)), _expected(mask))


@pytest.mark.compiler
def test_a_float64_mask_is_compared_in_float64() -> None:
    mask = torch.rand(1, 48, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sub(0.99).clamp(0, 1e-300)
    spec = _map("float64")
    made = CppTileMap(spec, build_tile_map(spec))([mask], [1, 48, 512])
    assert made.any() and torch.equal(made, reference.tile_map(spec, [mask], [1, 48, 512]))


def check_map(spec: TileMap, kernel: MapKernel, dtype: str, shapes: Iterable[tuple[int, int, int]]) -> None:
    for shape in shapes:
        mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.999).cumprod(-1).to(getattr(torch, dtype))
        for operand in (mask, mask.mT.contiguous().mT):
            assert torch.equal(kernel([operand], list(shape)), reference.tile_map(spec, [operand], list(shape)))


def _negated(spec: TileMap) -> TileMap:
    return replace(spec, predicate=apply("not", spec.predicate, dtype="bool"))


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", ["bool", "float32", "bfloat16", "int64"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("negated", [False, True])
def test_the_kernels_map_is_the_references(dtype: str, isa: str, negated: bool) -> None:
    spec = _negated(_map(dtype)) if negated else _map(dtype)
    check_map(spec, CppTileMap(spec, build_tile_map(spec, isa)), dtype, [(2, 33, 130), (1, 1, 1), (2, 100, 700), (1, 48, 512)])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", ["bool", "float32", "bfloat16", "int64"])
def test_the_triton_kernels_map_is_the_references(dtype: str) -> None:
    pytest.importorskip("triton", reason="no Triton on this platform")
    import triton_interpreter  # noqa: F401  mends the interpreter

    from fuse.targets.triton.launch_tile_map import TritonTileMap

    for spec in (_map(dtype), _negated(_map(dtype))):
        check_map(spec, TritonTileMap(spec), dtype, [(2, 33, 130), (1, 1, 1), (1, 17, 700)])
