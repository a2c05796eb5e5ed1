"""Candidates: where a search begins, and how far a slice reaches."""

from __future__ import annotations

from typing import Any

import torch
from programs import attend, heads
from torch import Tensor, nn
from torch.fx import GraphModule

from fuse.passes.find import Candidate, find
from fuse.passes.read.graph import ambient, operator_name, states


def candidates(program: Any, *args: Any) -> list[Candidate]:
    found: list[Candidate] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        found.extend(find(gm.graph, states(gm.graph, ambient())))
        return gm.forward

    with torch.no_grad():
        torch.compile(program, backend=backend)(*args)
    return found


def names(candidate: Candidate) -> set[str]:
    return {operator_name(n) for n in candidate.nodes}


def test_a_softmax_that_feeds_no_product_is_no_candidate() -> None:
    assert candidates(lambda x: x.softmax(-1).argmax(-1), torch.randn(4, 5)) == []


def test_the_slice_ends_where_activations_are_made() -> None:
    layer = nn.Linear(16, 16)
    (found,) = candidates(lambda q, k, v: attend(layer(q), k, v), *heads())
    assert "linear" not in names(found) and {operator_name(n) for n in found.inputs} >= {"linear"}


def test_operands_are_followed_through_views_only() -> None:
    (found,) = candidates(lambda q, k, v: attend(q.cos(), k.transpose(1, 2).transpose(1, 2), v), *heads())
    assert "cos" not in names(found) and "transpose" in names(found)


def test_the_producers_of_a_mask_belong_to_the_slice() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((9, 9), float("-inf")).triu(1)
        return attend(q, k, v, mask)

    (found,) = candidates(program, *heads())
    assert {"full", "triu"} <= names(found)


def test_writes_in_place_belong_to_the_slice_that_owns_the_memory() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = q @ k.transpose(-1, -2)
        score.masked_fill_(torch.ones(9, 9).triu(1) == 1, float("-inf"))
        return score.softmax(-1) @ v

    (found,) = candidates(program, *heads())
    assert "masked_fill_" in names(found)


def test_the_addend_of_baddbmm_is_followed_as_scores_are() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((6, 9, 9), float("-inf")).triu(1)
        return torch.baddbmm(mask, q, k.transpose(1, 2)).softmax(-1) @ v

    (found,) = candidates(program, *(x.flatten(0, 1) for x in heads()))
    assert {"full", "triu"} <= names(found)


def test_products_that_reach_another_one_are_a_candidate_without_a_softmax() -> None:
    (found,) = candidates(lambda q, k, v: (q @ k.mT).sigmoid() @ v, *heads())
    assert not found.softmax and operator_name(found.anchor) == "matmul"


def test_what_makes_the_scores_of_an_attention_is_none_of_its_own() -> None:
    """Rotary positions: a product before the scores, by way of a cosine."""

    def program(q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor) -> Tensor:
        angles = (frequencies[:, None] @ torch.arange(9.0)[None]).mT
        return attend(q * angles.cos(), k * angles.cos(), v)

    (found,) = candidates(program, *heads(), torch.randn(16))
    assert found.softmax
