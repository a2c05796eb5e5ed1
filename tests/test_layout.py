"""The result is stored in the order in which its consumer reads it, where that is safe."""

from __future__ import annotations

import torch
from programs import attend, heads, pass_over
from torch import Tensor

from fuse.ir import expr
from fuse.ir.text import to_text


def order(program: object) -> tuple[int, ...]:
    return pass_over(program, *heads()).spec.out_order  # type: ignore[arg-type]


def test_heads_behind_positions_when_the_consumer_transposes_and_copies() -> None:
    assert order(lambda q, k, v: attend(q, k, v).transpose(1, 2).contiguous()) == (0, 2, 1, 3)
    assert order(lambda q, k, v: attend(q, k, v).permute(0, 2, 1, 3).reshape(2, 9, 48)) == (0, 2, 1, 3)


def test_dense_where_the_result_is_used_as_it_is() -> None:
    assert order(lambda q, k, v: attend(q, k, v) + 1) == (0, 1, 2, 3)


def test_dense_where_somebody_else_also_reads_it() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(q, k, v)
        return out.transpose(1, 2).contiguous(), out.view(6, 9, 16)

    assert order(program) == (0, 1, 2, 3)


def test_dense_where_a_view_would_not_accept_other_strides() -> None:
    assert order(lambda q, k, v: attend(q, k, v).transpose(0, 1).unsqueeze(0)) == (0, 1, 2, 3)


def test_dense_where_one_of_two_readers_would_not_accept_other_strides() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(q, k, v).transpose(1, 2)
        return out.contiguous(), out.transpose(1, 2).view(6, 9, 16)

    assert order(program) == (0, 1, 2, 3)


def test_the_copy_that_follows_costs_nothing() -> None:
    passed = pass_over(lambda q, k, v: attend(q, k, v).transpose(1, 2).contiguous(), *heads())
    assert passed.result.is_contiguous()
    torch.testing.assert_close(passed.result, attend(*heads_again()).transpose(1, 2).contiguous())


def heads_again() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return heads()


def test_a_bias_with_heads_innermost_is_copied_once_with_keys_innermost() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table[torch.arange(9)[None, :] - torch.arange(9)[:, None] + 8].relu().cumsum(-1)
        return attend(q, k, v, bias.permute(2, 0, 1)[None])

    passed = pass_over(program, *heads(), torch.randn(17, 3))
    (bias,) = [o for i, o in enumerate(passed.spec.operands) if o.rank == 3]
    (load,) = [n for n in expr.walk(passed.spec.score) if isinstance(n, expr.Load)]
    assert bias.rank == 3 and to_text(load).endswith("[q, b1, k]")
    torch.testing.assert_close(passed.result, program(*heads_again(), torch.randn(17, 3)))


def test_a_bias_whose_keys_are_neighbours_already_is_not_copied() -> None:
    """Whatever the order of its dimensions."""

    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, bias.permute(2, 0, 1))

    passed = pass_over(program, *heads(), torch.randn(3, 9, 9).permute(1, 2, 0))
    (load,) = [n for n in expr.walk(passed.spec.score) if isinstance(n, expr.Load)]
    assert to_text(load).endswith("[q, k, b1]")
