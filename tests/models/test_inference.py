"""Every attention layer of every model is fused, with the mask its architecture has, no farther from float64 than eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import Measured, measure, prepared

Record = Callable[[str, object], None]


class Case(NamedTuple):
    model: str
    attention: str
    dtype: str
    target: str

    def __str__(self) -> str:
        return "-".join(self)


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
    model = MODELS[case.model]
    network, inputs = prepared(*model.build(case.attention), getattr(torch, case.dtype))
    measured = measure(network, inputs, target=case.target, inner="aot_eager")
    masks = masks_of(measured)
    record_property("row", row(case, model.sites, measured, masks))
    assert not measured.declined
    assert measured.fused == model.sites
    assert masks == model.masks
    measured.assert_no_farther()


def masks_of(measured: Measured) -> tuple[str, ...]:
    """Predicates in order, without repeats."""
    return tuple(dict.fromkeys(site.mask for site in measured.sites))


def row(case: Case, sites: int, measured: Measured, masks: tuple[str, ...]) -> tuple[str, ...]:
    errors = (f"{measured.eager:.2e}", f"{measured.fuse:.2e}")
    return (*case, str(sites), str(measured.fused), *errors, "; ".join(mask or "none" for mask in masks))
