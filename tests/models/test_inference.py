"""Every attention layer of every model is fused, with the mask its architecture has, no farther from float64 than eager."""

from __future__ import annotations

import pytest
from together import narrow

from models import EAGER_ONLY, MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import Case, Record, measure


def cases() -> list[Case]:
    """Training has the model's first implementation in float32, and its last in bfloat16; here are the two that remain. Where
    there is one implementation only, training has its kernels in bfloat16."""
    ways = {("eager", "sdpa"): (("eager", "bfloat16"), ("sdpa", "float32")), EAGER_ONLY: (("eager", "float32"),)}
    return [Case(m.name, *way, "cpp") for m in MODELS.values() for way in ways[m.implementations]]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_site_is_fused_and_no_error_grows(case: Case, record_property: Record) -> None:
    network, inputs = case.prepared()
    with narrow():  # as they are planned in training, and inside Inductor
        measured = measure(network, inputs, target=case.target, inner="eager")  # training has AOTAutograd
    case.assert_fused(measured, record_property)
    measured.errors.assert_no_farther()
