"""A model that is asked for its attention weights runs as it did, and gives them."""

from __future__ import annotations

import pytest
import torch

import fuse
from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import prepared


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Llama", "T5", "ViT"])
def test_attention_weights_are_given_where_asked_for(name: str) -> None:
    network, inputs = prepared(*MODELS[name].build("eager"), torch.float32)
    compiled = torch.compile(network, backend="fuse", options={"target": "cpp", "inner": "aot_eager"})
    with torch.no_grad():
        result, eager = compiled(**inputs, output_attentions=True), network(**inputs, output_attentions=True)
    sites = fuse.report().sites
    assert {type(site.reason).__name__ for site in sites} == {"ProbabilitiesUsed"}
    assert len(sites) == MODELS[name].sites
    weights = [key for key in eager if key.endswith("attentions")]
    assert weights
    for key in weights:
        torch.testing.assert_close(result[key], eager[key])
    torch.testing.assert_close(result.last_hidden_state, eager.last_hidden_state)
