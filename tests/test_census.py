"""Nothing is silent: what is no site is told, too."""

from __future__ import annotations

import json
from typing import Any

import torch
from programs import attend, heads
from torch import Tensor

import fuse

_library: Any = torch.library.Library("census", "DEF")
_library.define("paged_attention(Tensor q) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("paged_attention", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("census::paged_attention", torch.empty_like, lib=_library)


def test_a_router_is_told_and_is_no_site() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v), q.sum(-1).softmax(-1)

    report = fuse.explain(program, *heads())
    assert report.fused == 1 and str(report).endswith("1 other normalisation, read as no attention: report.others")
    (other,) = json.loads(report.to_json())["others"]
    assert other["operator"] == "softmax" and other["where"].startswith("test_census.py:") and "product" in other["why"]


def test_scores_from_elsewhere_say_so() -> None:
    (other,) = fuse.explain(lambda s, v: s.softmax(-1) @ v, torch.randn(4, 9, 9), torch.randn(4, 9, 16)).others
    assert "no product of query and key" in other.why


def test_attention_that_fuse_cannot_read_is_a_site() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch._higher_order_ops.map(lambda x: attend(x, x, x), torch.ops.census.paged_attention(q))

    report = fuse.explain(program, *heads())
    assert sorted(site.reason.name for site in report.sites if site.reason) == ["UnreadBody", "UnreadOperator"]


def test_a_graph_without_attention_says_what_was_looked_for() -> None:
    text = str(fuse.explain(torch.sin, torch.randn(3)))
    assert text.splitlines()[0] == "0 attention sites, 0 fused" and "scaled_dot_product_attention" in text and "1 graph" in text


def test_a_graph_that_is_not_looked_into_says_why() -> None:
    with torch.device("meta"):
        assert "no kernels for tensors on meta" in str(fuse.explain(torch.sin, torch.randn(3)))
