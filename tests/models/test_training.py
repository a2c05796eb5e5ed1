"""In training the same sites are fused as in inference; no error of results, or of gradients of all parameters, grows."""

from __future__ import annotations

import pytest
import torch
from together import for_queries

import fuse
from models import LENGTH, MODELS, decoders, encoders, pairs, text  # noqa: F401  (they register the models)
from models.decoders import hf, llama_like
from models.measure import Case, Record, measure_gradients, prepared, trained

# Where scores have learned parts beside queries and keys, kernels sum gradients of their own.
LEARNED = ("DeBERTa-v2", "XLNet", "Swin", "T5", "GPT-OSS")

# Most of the error of all gradients is that of a few tensors, so draws of it differ more than those of results do: single
# ones of OPT's were 0.8 to 1.3 times eager's. The largest ratio of four together was 1.03.
MARGIN = 1.15
pytestmark = pytest.mark.filterwarnings("error:fuse computes gradients of attention without its kernels")


def cases() -> list[Case]:
    """In bfloat16 with kernels, since the reference rounds where eager does and they do not; in float32 mostly without, and
    without AOTAutograd."""
    wide = [Case(m.name, "eager", "float32", "cpp" if m.name in LEARNED else "reference") for m in MODELS.values()]
    return wide + [Case(m.name, m.implementations[-1], "bfloat16", "cpp") for m in MODELS.values()]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_no_error_of_results_or_of_gradients_of_all_parameters_grows(case: Case, record_property: Record) -> None:
    network, inputs = case.prepared()
    inner = "aot_eager" if case.target == "cpp" else "eager"
    with for_queries(LENGTH):
        measured = measure_gradients(network, inputs, target=case.target, inner=inner)
    case.assert_fused(measured, record_property)
    measured.errors.assert_no_farther()
    measured.gradients.assert_no_farther(MARGIN)


def test_experts_that_are_chosen_get_the_same_gradients() -> None:
    """In float32 only: in bfloat16 a token may choose another expert after any rounding, eager's own included."""
    config = llama_like("eager", num_local_experts=4, num_experts_per_tok=2)
    network, inputs = prepared(hf.MixtralModel(hf.MixtralConfig(**config)), text("left"), torch.float32)
    run = torch.compile(network, backend="fuse", options={"target": "reference", "inner": "aot_eager"})
    torch.testing.assert_close(trained(run, network, inputs), trained(network, network, inputs), rtol=1e-3, atol=1e-3)
    assert fuse.report().recovered == 1


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
