"""Plans of Triton kernels fit the architecture, and architectures that nobody listed get one that fits."""

from __future__ import annotations

import pytest
from specs import CASES

from fuse.targets.triton.plan import (
    ARCHITECTURES,
    Architecture,
    architecture,
    candidates,
    plan_triton,
    registers,
    shared_memory,
)

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=lambda arch: arch.name)


@every_architecture
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_every_candidate_but_the_last_resort_fits(arch: Architecture, dtype: str) -> None:
    for name in ("causal", "head_dim_256", "dense_additive", "t5_bias"):
        spec = CASES[name](dtype).spec
        for plan in candidates(spec, arch)[:-1]:
            assert shared_memory(spec, plan, arch) <= arch.shared
            assert registers(spec, plan, arch) <= arch.registers


@every_architecture
def test_candidates_are_few_and_different_and_the_plan_is_the_first(arch: Architecture) -> None:
    spec = CASES["causal"]("bfloat16").spec
    found = candidates(spec, arch)
    assert plan_triton(spec, arch) == found[0]
    assert 2 <= len(found) <= 8 and len(set(found)) == len(found)


@every_architecture
def test_the_last_resort_asks_for_least(arch: Architecture) -> None:
    spec = CASES["causal"]("bfloat16").spec
    *rest, last = candidates(spec, arch)
    assert all(shared_memory(spec, last, arch) < shared_memory(spec, plan, arch) for plan in rest)


def test_tiles_hold_features_in_powers_of_two() -> None:
    plan = plan_triton(CASES["value_narrower_than_key"]("bfloat16").spec, ARCHITECTURES["sm_90"])
    assert (plan.width, plan.v_width) == (64, 16)


def test_units_that_read_shared_memory_get_larger_tiles() -> None:
    spec = CASES["plain"]("bfloat16").spec
    assert plan_triton(spec, ARCHITECTURES["sm_90"]).block_k > plan_triton(spec, ARCHITECTURES["sm_80"]).block_k


@pytest.mark.parametrize(
    ("name", "known"),
    [("sm_90", "sm_90"), ("sm_87", "sm_86"), ("sm_103", "sm_86"), ("sm_70", "sm_75"), ("gfx1100", "gfx90a"), ("?", "sm_75")],
)
def test_an_unknown_architecture_is_taken_for_a_modest_one(name: str, known: str) -> None:
    assert architecture(name).name == known
