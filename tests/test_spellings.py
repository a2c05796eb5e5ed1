"""Every spelling of attention is found, and gives what eager gives; see tests/spellings."""

from __future__ import annotations

import pytest
from spellings import (
    SPELLINGS,
    biases,
    check,
    composites,
    layouts,
    masks,
    near_miss_masks,
    near_misses,
    products,
    regions,
    scales,
    softmaxes,
)

TOPICS = (softmaxes, products, scales, masks, biases, layouts, composites, regions, near_misses, near_miss_masks)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    check(name)
