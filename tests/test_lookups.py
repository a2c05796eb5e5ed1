"""Biases that are read through views and tables: what is smaller than the scores stays so, and nothing is looked up twice."""

from __future__ import annotations

import pytest
import torch
from programs import Passed, attend, attention_calls, computed, heads, pass_over, square
from torch import Tensor

from fuse.ir import expr
from fuse.ir.expr import Load
from fuse.ir.text import to_text
from fuse.passes.read.elements import spec_reader

N = 36  # positions of a window of 6 x 6


def coordinates(passed: Passed) -> list[str]:
    """Those of each load in the score, multiplied out."""
    r = spec_reader(passed.spec)
    loads = [n for n in expr.walk(passed.spec.score) if isinstance(n, Load)]
    return [", ".join(str(r.index(c)) for c in n.coords) for n in loads]


def places() -> Tensor:
    return torch.randint(121, (N, N), generator=torch.Generator().manual_seed(0))


def swin(q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return attend(q, k, v, table[at.view(-1)].view(N, N, -1).permute(2, 0, 1).unsqueeze(0))


def swin_v2(q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return attend(q, k, v, 16 * torch.sigmoid(table[at.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()))


@pytest.mark.parametrize("program", [swin, swin_v2])
def test_a_bias_that_windows_share_is_looked_up_once(program: object) -> None:
    tensors = (*heads(N, batch=8), torch.randn(121, 3), places())
    passed = pass_over(program, *tensors)  # type: ignore[arg-type]
    (load,) = [n for n in expr.walk(passed.spec.score) if isinstance(n, Load)]
    bias = attention_calls(passed)[0].args[0][load.operand]
    assert coordinates(passed)[0].endswith("b1, q, k") and computed(passed)[bias].numel() == 3 * N * N
    assert square(passed, 8 * 3 * N * N) == []
    torch.testing.assert_close(passed.result, program(*tensors))  # type: ignore[operator]


def in_a_product(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, at: Tensor) -> Tensor:
    return attend(q, k, v, torch.gather(q @ keys.mT, -1, at.expand(2, 3, N, N)))


def in_a_table_of_each_head(q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return attend(q, k, v, table.view(2, 3, -1)[:, :, at])


@pytest.mark.parametrize("program, table", [(in_a_product, (20, 16)), (in_a_table_of_each_head, (2, 60))])
def test_a_lookup_as_large_as_the_scores_is_done_in_the_kernel(program: object, table: tuple[int, int]) -> None:
    tensors = (*heads(N), torch.randn(table), places() % 20)
    passed = pass_over(program, *tensors)  # type: ignore[arg-type]
    assert square(passed, 2 * 3 * N * 20 + 1) == []  # the product of queries and distances, and no more
    torch.testing.assert_close(passed.result, program(*tensors))  # type: ignore[operator]


def test_a_mask_beside_a_bias_is_read_as_a_mask() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor) -> Tensor:
        i = torch.arange(N)
        return attend(q, k, v, table[at].permute(2, 0, 1) + torch.where(i <= i[:, None], 0.0, -torch.inf))

    tensors = (*heads(N), torch.randn(121, 3), places())
    passed = pass_over(program, *tensors)
    assert passed.sites[0].mask == "k <= q"
    torch.testing.assert_close(passed.result, program(*tensors))


def by_padding(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Music Transformer, Huang et al. 2018, section 3.4: pad a column, view, slice."""
    n = q.shape[-2]
    scores = torch.nn.functional.pad(q @ table.mT, (1, 0)).view(2, 3, 2 * n, n)
    return attend(q, k, v, scores[:, :, 1:].reshape(2, 3, n, 2 * n - 1)[..., :n])


def by_view(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """XLNet: a column more than needed, read as if there were one less."""
    n = q.shape[-2]
    scores = (q @ torch.cat([table, table[:1]]).mT).reshape(2, 3, 2 * n, n)[:, :, 1:]
    return attend(q, k, v, scores.reshape(2, 3, n, 2 * n - 1)[..., :n])


@pytest.mark.parametrize("program", [by_padding, by_view])
def test_a_skewed_product_is_read_along_the_distance(program: object) -> None:
    tensors = (*heads(N), torch.randn(2 * N - 1, 16))
    passed = pass_over(program, *tensors)  # type: ignore[arg-type]
    (coords,) = coordinates(passed)
    assert coords.endswith(("q, k - q + 35", "q, k - q + 36")), coords
    assert square(passed, 2 * 3 * N * 2 * N + 1) == []
    torch.testing.assert_close(passed.result, program(*tensors))  # type: ignore[operator]


def test_a_shift_of_an_input_makes_no_copy() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, distances: Tensor) -> Tensor:
        padded = torch.cat([torch.zeros(2, 3, N, 1), distances], -1).view(2, 3, 2 * N, N)
        return attend(q, k, v, padded[:, :, 1:].view_as(distances)[..., :N])

    tensors = (*heads(N), torch.randn(2, 3, N, 2 * N - 1))
    passed = pass_over(program, *tensors)
    assert square(passed, N * N) == [] and coordinates(passed) == ["b0, b1, q, k - q + 35"]
    torch.testing.assert_close(passed.result, program(*tensors))


def test_decomposed_positions_stay_two_tensors() -> None:
    """SAM and MViT: one term for the key's row, one for its column."""

    def program(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return attend(q, k, v, (rows[..., :, None] + columns[..., None, :]).view(2, 3, N, N))

    tensors = (*heads(N), torch.randn(2, 3, N, 6), torch.randn(2, 3, N, 6))
    passed = pass_over(program, *tensors)
    loads = [to_text(n) for n in expr.walk(passed.spec.score) if isinstance(n, Load)]
    assert square(passed, N * N) == [] and ["k // 6" in x for x in loads] == [True, False]
    torch.testing.assert_close(passed.result, program(*tensors))
