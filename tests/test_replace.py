"""The graph after the passes: one op in the place of each root, nothing that only the site had used, nothing else changed."""

from __future__ import annotations

import torch
from programs import Passed, attend, heads, pass_over
from torch import Tensor

from fuse.passes.read.graph import operator_name


def calls(passed: Passed) -> list[str]:
    return [operator_name(n) for n in passed.graph.graph.nodes if n.op in ("call_function", "call_method")]


def test_the_slice_is_one_call() -> None:
    assert calls(pass_over(attend, *heads())) == ["attention"]


def test_a_mask_that_is_also_used_elsewhere_stays() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.arange(9)[None, :] <= torch.arange(9)[:, None]
        return attend(q, k, v, torch.where(keep, 0.0, -1e38)), keep.sum()

    passed = pass_over(program, *heads())
    assert passed.spec.mask is not None
    assert "le" in calls(passed) and "where" not in calls(passed)
    assert int(passed.result[1]) == 45


def test_a_refused_site_leaves_the_graph_as_it_was() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.transpose(-1, -2)
        return s.softmax(-1) @ v, s

    q, k, v = heads()
    passed = pass_over(program, q, k, v)
    assert calls(passed) == ["transpose", "matmul", "softmax", "matmul"]
    assert torch.equal(passed.result[1], q @ k.transpose(-1, -2))


def test_weights_that_are_read_are_written_by_a_call_of_their_own() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        return p @ v, p

    q, k, v = heads()
    passed = pass_over(program, q, k, v)
    assert calls(passed) == ["attention_rows", "getitem", "getitem", "attention_weights"]  # nobody reads the log-sum-exp
    torch.testing.assert_close(passed.result[1], (q @ k.transpose(-1, -2)).softmax(-1))


def test_two_products_with_the_same_probabilities_are_fused_together() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        return p @ v, p @ (v + 1)

    passed = pass_over(program, *heads())
    assert [s.fused for s in passed.sites] == [True, True] and "softmax" not in calls(passed)


def test_the_call_says_where_it_comes_from() -> None:
    node = next(n for n in pass_over(attend, *heads()).graph.graph.nodes if operator_name(n) == "attention")
    assert "softmax(-1) @ v" in (node.meta.get("stack_trace") or "")


def test_weights_that_nobody_reads_do_not_keep_the_scores() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        p.mean(1).view(2, 9, 9)
        return p @ v

    assert calls(pass_over(program, *heads())) == ["attention"]
