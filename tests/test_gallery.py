"""The masks of docs/masks.md are read as structure, computed as eager PyTorch does, and shown as they are."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from documents import ROOT

from fuse.ir.expr import Load, axes, walk

_SPEC = importlib.util.spec_from_file_location("gallery", ROOT / "docs/gallery.py")
assert _SPEC is not None and _SPEC.loader is not None
gallery: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gallery)

MASKS = [pytest.param(mask, id=mask.__name__) for mask in gallery.MASKS]


def test_there_are_twenty() -> None:
    assert len({mask.__name__ for mask in gallery.MASKS}) == 20


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_read_as_structure(mask: Any) -> None:
    """Nothing in it is a tensor of queries and keys."""
    site = gallery.site(mask)
    assert site.recovered and site.spec is not None and site.spec.mask is not None
    loads = [n for n in walk(site.spec.mask.predicate) if isinstance(n, Load)]
    assert not [load for load in loads if axes(load) >= {"q", "k"}]
    assert {site.names[load.operand] for load in loads} == set(gallery.tensors(mask))


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_computed_as_in_eager(mask: Any) -> None:
    attend, inputs = gallery.attention(mask), torch.randn(3, 1, 2, gallery.LENGTH, 16)
    compiled = torch.compile(attend, backend="fuse", options={"inner": "eager", "target": "reference"})
    read = gallery.tensors(mask)
    torch.testing.assert_close(compiled(*inputs, **read), attend(*inputs, **read), equal_nan=True)


@pytest.mark.parametrize("mask", MASKS)
def test_a_picture_is_that_of_the_mask(mask: Any) -> None:
    """As many entries are coloured as are seen, and it is what the script draws."""
    drawn = (ROOT / f"docs/masks/{mask.__name__}.svg").read_text()
    blue = re.findall(r'<path fill="#(?:1565c0|64b5f6)" d="(.*)"/>', drawn)
    widths = [int(width) for path in blue for width in re.findall(r"h(\d+)", path)]
    assert sum(widths) == gallery.PIXELS * int(gallery.entries(mask).sum())
    assert drawn == gallery.picture(mask)


def test_the_page_shows_them_as_they_are() -> None:
    assert (ROOT / "docs/masks.md").read_text() == gallery.page()
