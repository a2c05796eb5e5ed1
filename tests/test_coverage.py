"""The share of tiles that a mask saves is what counting them gives, and never more."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from fuzz.masks import forms
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from programs import heads, pass_over
from torch import Tensor

from fuse.ir.spec import AttentionSpec
from fuse.report.sparsity import Coverage, coverage

Predicate = Callable[[Tensor, Tensor], Tensor]


def predicate(form: str) -> Predicate:
    found: Predicate = eval(f"lambda i, j, n, m: {form}", {"torch": torch})
    return lambda q, k: found(q, k, len(q), len(k))  # type: ignore[call-arg]


PREDICATES = forms(data=False).map(predicate)


def masked(keep: Predicate, q_len: int, kv_len: int) -> tuple[AttentionSpec, tuple[int, ...]] | None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = keep(torch.arange(q_len)[:, None], torch.arange(kv_len))
        return torch.where(visible, q @ k.mT, -math.inf).softmax(-1) @ v

    torch._dynamo.reset()
    sites = pass_over(program, *heads(q_len, kv_len, batch=1, count=1)).sites
    return (sites[0].spec, sites[0].sizes) if sites and sites[0].spec and sites[0].spec.mask else None


def empty_tiles(keep: Predicate, q_len: int, kv_len: int, rows: int, keys: int) -> float:
    visible = keep(torch.arange(q_len)[:, None], torch.arange(kv_len)).expand(q_len, kv_len)
    tiles = [t for block in visible.split(rows) for t in block.split(keys, 1)]
    return sum(not t.any() for t in tiles) / len(tiles)


@pytest.mark.parametrize(
    "keep",
    [
        lambda q, k: k <= q,
        lambda q, k: (k <= q) & (q - k < 10),
        lambda q, k: q // 16 == k // 16,
        lambda q, k: (k <= q) | (k < 5),
        lambda q, k: (k < 20) & ~(q < k),
        lambda q, k: (q - k).abs() <= 12,
    ],
    ids=["causal", "window", "chunks", "prefix", "both", "band"],
)
def test_the_share_is_that_of_tiles_without_a_visible_entry(keep: Predicate) -> None:
    spec, sizes = masked(keep, 70, 90) or pytest.fail("no mask was recovered")
    assert coverage(spec, sizes, 8, 16) == Coverage(pytest.approx(empty_tiles(keep, 70, 90, 8, 16)), exact=True)


@settings(max_examples=60, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(PREDICATES, st.integers(2, 40), st.integers(2, 40), st.integers(1, 8), st.integers(1, 8))
def test_no_tile_counts_as_skipped_that_has_a_visible_entry(
    keep: Predicate, q_len: int, kv_len: int, rows: int, keys: int
) -> None:
    found = masked(keep, q_len, kv_len)
    if found is not None:
        share = coverage(*found, rows, keys)
        assert share is not None and share.skipped <= empty_tiles(keep, q_len, kv_len, rows, keys) + 1e-9


def test_the_last_tiles_end_with_the_sequence() -> None:
    """Of 9 positions in tiles of 8, the last query sees nothing after itself."""
    spec, sizes = masked(lambda q, k: k > q, 9, 9) or pytest.fail("no mask was recovered")
    assert coverage(spec, sizes, 8, 8) == Coverage(0.5, exact=True)


def test_integers_that_wrap_are_seen_on_either_side() -> None:
    def keep(q: Tensor, k: Tensor) -> Tensor:
        return (k * 60).to(torch.int8).long() + 0 * q < 0

    spec, sizes = masked(keep, 70, 90) or pytest.fail("no mask was recovered")
    found = coverage(spec, sizes, 8, 16)
    assert found is not None and found.skipped <= empty_tiles(keep, 70, 90, 8, 16)


def test_what_the_data_decide_is_not_claimed() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, causal: bool) -> Tensor:
        i = torch.arange(64)
        visible = kept[:, None, None, :] & (i <= i[:, None]) if causal else kept[:, None, None, :]
        return torch.where(visible, q @ k.mT, -math.inf).softmax(-1) @ v

    for causal, text in ((False, "depends on the data"), (True, "at least 44 % of the tiles, more depends on the data")):
        (site,) = pass_over(program, *heads(64), torch.ones(2, 64, dtype=torch.bool), causal).sites
        assert site.spec is not None and str(coverage(site.spec, site.sizes, 8, 8)) == text


def test_it_takes_no_time_at_sixteen_thousand_positions() -> None:
    """A node is computed for each of 256 x 256 tiles, and not for 16384 x 16384 entries."""
    spec, sizes = masked(lambda q, k: k <= q, 64, 64) or pytest.fail("no mask was recovered")
    long = (*sizes[: spec.batch], 16384, 16384)
    found = coverage(spec, long, 64, 64)
    assert found is not None and found.skipped == pytest.approx(255 / 512)
