"""What is read out of a program: operands behind their views, the score as written, the batch as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import attend, heads, pass_over
from torch import Tensor

from fuse.ir import expr
from fuse.ir.text import to_text
from fuse.report.reasons import ProbabilitiesUsed, RandomNumbers, ScoresUsed, WrongDimension


def test_grouped_heads_are_an_index_map_not_a_copy() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(2, 2, 3, 9, 16).reshape(2, 6, 9, 16) for x in (k, v))
        return attend(q, k, v)

    spec = pass_over(program, torch.randn(2, 6, 9, 16), *heads(count=2)[1:]).spec
    assert to_text(spec.key).endswith("[b0, b1 // 3, k, d]") or to_text(spec.key).endswith("[b0, (b1 // 3), k, d]")
    assert [o.rank for o in spec.operands] == [4, 4, 4]


@pytest.mark.parametrize("transposed", [lambda x: x.mT, torch.ops.aten.mT], ids=["attribute", "operator"])
def test_grouped_heads_are_seen_through_an_attribute_as_any_dynamo_has_it(transposed: Callable[[Tensor], Tensor]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ transposed(k.repeat_interleave(3, 1))).softmax(-1) @ v.repeat_interleave(3, 1)

    spec = pass_over(program, torch.randn(2, 6, 9, 16), *heads(count=2)[1:]).spec
    assert to_text(spec.key).endswith("[b0, (b1 // 3), k, d]")


def test_of_heads_and_positions_that_share_a_value_the_positions_are_the_queries() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k).softmax(-1), v)

    spec = pass_over(program, torch.randn(2, 6, 9, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)).spec
    assert to_text(spec.query).endswith("[b0, b1, q, d]") and to_text(spec.key).endswith("[b0, k, d]")


@pytest.mark.parametrize("view", [lambda x: torch.einsum("qkhb->bhqk", x), lambda x: x.permute(3, 2, 0, 1)])
def test_an_einsum_of_one_operand_is_the_view_that_it_is(view: Callable[[Tensor], Tensor]) -> None:
    """Though torch's functionalize takes it for a copy."""

    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + view(bias)).softmax(-1) @ v

    spec = pass_over(program, *heads(), torch.randn(9, 9, 3, 2)).spec
    assert to_text(spec.score) == "score + operand0[q, b1, b0, k]"  # of a copy whose keys lie side by side


def test_a_packed_projection_is_one_operand() -> None:
    def program(x: Tensor) -> Tensor:
        q, k, v = x.view(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v)

    spec = pass_over(program, torch.randn(2, 9, 192)).spec
    assert spec.query.operand == spec.key.operand == spec.value.operand == 0
    assert len(spec.operands) == 1


def test_a_key_that_is_stored_transposed_is_read_so() -> None:
    q, k, v = heads()
    spec = pass_over(lambda q, kt, v: (q @ kt).softmax(-1) @ v, q, k.transpose(-1, -2).contiguous(), v).spec
    assert to_text(spec.key).endswith("[b0, b1, d, k]")


@pytest.mark.parametrize("scale", [0.25, 3.0, -1.0])
def test_the_scale_is_read(scale: float) -> None:
    spec = pass_over(lambda q, k, v: ((q @ k.transpose(-1, -2)) * scale).softmax(-1) @ v, *heads()).spec
    assert [n.value for n in expr.walk(spec.score) if isinstance(n, expr.Const)] == [scale]


def test_a_product_that_decides_a_condition_is_not_the_score() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return (q @ k.mT + (x @ x.mT > 0) * torch.finfo(q.dtype).min).softmax(-1) @ v

    spec = pass_over(program, *heads(), torch.randn(2, 3, 9, 4)).spec
    assert spec.qk_dim == 16 and spec.mask is not None and not expr.contains(spec.mask.predicate, expr.Score)


def test_a_product_of_two_dtypes_is_refused_as_by_eager() -> None:
    """Dynamo's fake tensors let ``mm`` pass."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.mm(torch.mm(q, k.mT).softmax(-1), v)

    q, k, v = (x[0, 0] for x in heads())
    for run in (program, torch.compile(program, backend="fuse", options={"inner": "eager", "target": "reference"})):
        with pytest.raises(RuntimeError, match="expected|dtype"):
            run(q, k, v.double())


def test_sizes_are_no_part_of_the_spec() -> None:
    assert pass_over(attend, *heads(9)).spec.to_json() == pass_over(attend, *heads(11, batch=3, count=5)).spec.to_json()


def test_layers_that_are_alike_have_one_spec() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(attend(q, k, v), k, v)

    first, second = pass_over(program, *heads()).sites
    assert first.spec is not None and second.spec is not None and first.spec.to_json() == second.spec.to_json()


def test_symbolic_lengths_are_arguments() -> None:
    spec = pass_over(attend, *heads(9, 11), dynamic=True).spec
    assert spec.extra == () and spec.symbols == ("B0", "B1", "q_len", "kv_len")


@pytest.mark.parametrize(
    "left, parts",
    [
        (4, ["q, minimum(maximum(k - 4, 0), 4)]", "q, minimum(maximum(k, 0), 3)]"]),
        (8, ["q, 0]", "q, minimum(maximum(k, 0), 7)]"]),
    ],
)
def test_no_part_of_what_was_joined_is_read_beyond_its_end(left: int, parts: list[str]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return attend(q, k, v, torch.cat((left, right), -1))

    spec = pass_over(program, *heads(), torch.randn(9, left), torch.randn(9, 9 - left)).spec
    assert sorted(to_text(n).partition("[")[2] for n in expr.walk(spec.score) if isinstance(n, expr.Load)) == parts


def wrong_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-2) @ v


def returns_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = q @ k.transpose(-1, -2)
    return s.softmax(-1) @ v, s


def draws_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.dropout(q @ k.transpose(-1, -2), 0.25, train=True)).softmax(-1) @ v


def draws_normal_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    return (p * torch.randn_like(p)) @ v


def selects(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = q @ k.transpose(-1, -2)
    return score.masked_fill(score < score.topk(3).values[..., -1:], float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    ("program", "reason", "says"),
    [
        (wrong_dimension, WrongDimension, "another dimension"),
        (returns_scores, ProbabilitiesUsed, "also used by"),
        (draws_scores, RandomNumbers, "scores"),
        (draws_normal_numbers, RandomNumbers, "randn_like"),
        (selects, ScoresUsed, "topk"),
    ],
)
def test_what_is_not_proved_is_declined_with_its_reason(program: object, reason: type, says: str) -> None:
    (site,) = pass_over(program, *heads()).sites  # type: ignore[arg-type]
    assert not site.fused and isinstance(site.reason, reason) and says in str(site.reason)
    assert site.where.startswith("test_lift.py:")
