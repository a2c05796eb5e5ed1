"""Models of transformers with ``attn_implementation="flex_attention"``, which nothing else trains on CPUs.

GPT-OSS is not among them: transformers refuses its attention sinks on CPUs. tests/test_flex.py has them as transformers writes
them.
"""

from __future__ import annotations

import pytest
import torch
from together import for_queries

from models import LENGTH, MODELS, decoders, encoders, text  # noqa: F401  (they register the models)
from models.measure import measure_gradients, prepared
from models.test_training import MARGIN

KERNELS = ("bfloat16", "cpp", "aot_eager")
# What is read of a model is the same in each way: a graph is rewritten before it is run or handed on.
WAYS = [("Llama", "float32", "reference", "eager"), *((name, *KERNELS) for name in ("Llama", "Mistral", "Gemma2", "BERT"))]


@pytest.mark.parametrize("name, dtype, target, inner", WAYS)
def test_every_site_is_fused_and_no_error_of_results_or_gradients_grows(name: str, dtype: str, target: str, inner: str) -> None:
    model, number = MODELS[name], getattr(torch, dtype)
    padded = text("right")  # on the left, queries would see nothing: FlexAttention gives 0 for them, eager an average
    network, inputs = prepared(model.build("flex_attention")[0], padded, number)
    plain, _ = prepared(model.build("eager")[0], padded, number)
    with for_queries(LENGTH):
        measured = measure_gradients(network, inputs, plain, target=target, inner=inner)
    assert measured.recovered == len(measured.sites) == model.sites, measured.declined
    assert target == "reference" or measured.fused == model.sites
    measured.errors.assert_no_farther()
    measured.gradients.assert_no_farther(MARGIN)
