"""A model that is asked for its attention weights gives eager's, with its result, in inference and in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fuse
from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import prepared

NAMES = ["GPT-2", "BERT", "Llama", "T5", "ViT"]


@pytest.mark.parametrize("name", NAMES)
def test_attention_weights_are_given_where_asked_for(name: str) -> None:
    network, inputs = prepared(*MODELS[name].build("eager"), torch.float32)
    compiled = torch.compile(network, backend="fuse", options={"target": "cpp", "inner": "aot_eager", "qualify": "never"})
    with torch.no_grad():
        result, eager = compiled(**inputs, output_attentions=True), network(**inputs, output_attentions=True)
    sites = fuse.report().sites
    assert len(sites) == MODELS[name].sites and all(site.fused for site in sites)
    assert all(site.runs["weights"].by == "kernel" for site in sites)
    weights = [key for key in eager if key.endswith("attentions")]
    assert weights
    for key in weights:
        torch.testing.assert_close(result[key], eager[key], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.last_hidden_state, eager.last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_a_model_by_its_attention_weights(name: str) -> None:
    network, inputs = prepared(*MODELS[name].build("eager"), torch.float64)
    compiled = torch.compile(network, backend="fuse", options={"target": "reference", "inner": "aot_eager"})
    with_weights, alone = (grads(network, compiled, inputs, weights) for weights in (True, False))
    assert all(site.recovered for site in fuse.report().sites)
    for theirs, ours in (with_weights, alone):
        largest = max(g.abs().amax().item() for g in theirs)
        for expected, got in zip(theirs, ours, strict=True):  # some models round scores to float32
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * largest)


def grads(
    network: torch.nn.Module, compiled: torch.nn.Module, inputs: dict[str, Tensor], weights: bool
) -> tuple[tuple[Tensor, ...], ...]:
    """Of the parameters by the model and by what it was compiled to; the loss reads the weights, or the states alone."""
    found = []
    for model in (network, compiled):
        out = model(**inputs, output_attentions=True)
        loss = out.last_hidden_state.square().mean()
        for key in [key for key in out if key.endswith("attentions")] if weights else []:
            loss = loss + sum(w.square().sum() for w in out[key])
        found.append(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, materialize_grads=True))
    return tuple(found)
