"""In training the same sites are fused as in inference, and gradients of all parameters are no farther from float64."""

from __future__ import annotations

import pytest
import torch

import fuse
from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import measure_gradients, prepared
from models.test_inference import Case, Record, masks_of, row

# The reference rounds in bfloat16 where eager does, kernels do not: what is claimed of errors there is a claim of kernels.
# Each takes seconds to build, so few models stand for the masks that there are.
IN_BFLOAT16 = ("Llama", "BERT", "ViT", "Whisper")


def cases() -> list[Case]:
    narrow = [Case(name, MODELS[name].implementations[-1], "bfloat16", "cpp") for name in IN_BFLOAT16]
    return [*(Case(m.name, m.implementations[0], "float32", "reference") for m in MODELS.values()), *narrow]


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
    assert report.fused == len(report.sites), [str(s.reason) for s in report.sites if not s.fused]
    if not hasattr(network, "encoder") or not hasattr(network.encoder, "layerdrop"):  # it breaks the graph in each layer
        assert report.fused == model.sites
