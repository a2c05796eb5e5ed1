"""Every attention layer of every model is fused, with the mask its architecture has, no farther from float64 than eager."""

from __future__ import annotations

import pytest

from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import Case, Record, measure


def cases() -> list[Case]:
    """Every model in both dtypes with its kernels; where it has two implementations of attention, one dtype with each.

    The other two of the four run with the reference evaluator: the passes see every case, but fewer kernels are built.
    """
    kernels = {("eager", "float32"), ("sdpa", "bfloat16")}
    return [
        Case(m.name, attention, dtype, "cpp" if (attention, dtype) in kernels or len(m.implementations) == 1 else "reference")
        for m in MODELS.values()
        for attention in m.implementations
        for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_site_is_fused_and_no_error_grows(case: Case, record_property: Record) -> None:
    network, inputs = case.prepared()
    measured = measure(network, inputs, target=case.target, inner="aot_eager")
    case.assert_fused(measured, record_property)
    measured.errors.assert_no_farther()
