"""In training the same sites are fused as in inference, and gradients of all parameters are no farther from float64."""

from __future__ import annotations

import pytest
import torch

import fuse
from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import measure_gradients, prepared
from models.test_inference import Case, Record, masks_of, row


def cases() -> list[Case]:
    """float32 with the first implementation of attention, bfloat16 with the last."""
    return [
        Case(m.name, attention, dtype, "reference")
        for m in MODELS.values()
        for attention, dtype in ((m.implementations[0], "float32"), (m.implementations[-1], "bfloat16"))
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_gradients_of_all_parameters_have_no_larger_error(case: Case, record_property: Record) -> None:
    model = MODELS[case.model]
    network, inputs = prepared(*model.build(case.attention), getattr(torch, case.dtype))
    measured = measure_gradients(network, inputs, target=case.target, inner="aot_eager")
    masks = masks_of(measured)
    record_property("row", row(case, model.sites, measured, masks))
    assert not measured.declined
    assert measured.fused == model.sites
    assert masks == model.masks
    measured.assert_no_farther()


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_fused_in_training_mode_with_its_dropout(name: str) -> None:
    model = MODELS[name]
    network, inputs = model.build(model.implementations[0])
    for module in network.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0  # else layers are left out at random
    report = fuse.explain(network.train(), **inputs)
    assert report.fused == len(report.sites) == model.sites, [str(s.reason) for s in report.sites if not s.fused]
