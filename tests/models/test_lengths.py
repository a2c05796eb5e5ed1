"""Compiled once with dynamic=True, a model takes texts of any length."""

from __future__ import annotations

import pytest
import torch

import fuse
from models import MODELS, decoders, encoders, pairs, text, tokens  # noqa: F401  (they register the models)
from models.measure import errors_over_draws, outputs, prepared

LENGTHS = (33, 120, 77)  # all longer than the windows, where the models take another way


@pytest.mark.parametrize(
    ("name", "attention", "side"),
    [
        ("GPT-2", "eager", None), ("Llama", "sdpa", "left"), ("Gemma2", "eager", "left"), ("BERT", "eager", "right"),
        ("T5", "eager", "right"),
    ],
)  # fmt: skip
def test_one_graph_serves_every_length(name: str, attention: str, side: str | None) -> None:
    model = MODELS[name]
    network, _ = prepared(*model.build(attention), torch.float32)
    compiled = torch.compile(network, backend="fuse", dynamic=True, options={"target": "cpp", "inner": "aot_eager"})
    for length in LENGTHS:
        inputs = text(side, length)
        if name == "T5":
            inputs["decoder_input_ids"] = tokens(length - 4, seed=2)
        errors_over_draws(compiled, network, inputs).assert_no_farther()
    report = fuse.report()  # a recompilation would count its sites anew
    assert (len(report.sites), report.fused) == (model.sites, model.sites), str(report)


@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_lengths_that_vary_compile_twice_at_most(name: str) -> None:
    """Without dynamic=True, torch fixes the first length and takes any from the second on."""
    network, _ = prepared(*MODELS[name].build("eager"), torch.float32)
    compiled = torch.compile(network, backend="fuse", options={"target": "reference", "inner": "aot_eager"})
    for length in LENGTHS:
        outputs(compiled, text("right", length))
    assert fuse.report().recovered == 2 * MODELS[name].sites
