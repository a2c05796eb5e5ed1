"""The rest of the model through Inductor, as users have it."""

from __future__ import annotations

import pytest
import torch

from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import measure, prepared


@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [("GPT-2", "eager", "float32"), ("Llama padded", "sdpa", "bfloat16"), ("BERT", "eager", "bfloat16")],
)
def test_sites_stay_fused_and_right_inside_inductor(name: str, attention: str, dtype: str) -> None:
    network, inputs = prepared(*MODELS[name].build(attention), getattr(torch, dtype))
    measured = measure(network, inputs, target="cpp", inner="inductor")
    assert measured.fused == len(measured.sites) == MODELS[name].sites
    measured.errors.assert_no_farther()
