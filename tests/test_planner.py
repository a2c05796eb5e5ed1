"""Choice of core and tile sizes."""

from __future__ import annotations

import pytest
from specs import CASES

from fuse.targets.cpp.plan import ISAS, backward_plan, plan

REGISTERS = {"avx512": 32, "avx2": 16, "neon": 32, "sse": 16}


@pytest.mark.parametrize("isa", REGISTERS)
def test_microkernel_stays_in_registers(isa: str) -> None:
    chosen = plan(CASES["plain"]("float32").spec, isa)
    assert chosen.rows * chosen.vectors + chosen.vectors + 1 <= REGISTERS[isa]


@pytest.mark.parametrize("isa", ISAS)
def test_tiles_of_keys_are_whole_microkernels(isa: str) -> None:
    chosen = plan(CASES["plain"]("float32").spec, isa)
    assert chosen.block_k % chosen.rows == 0


def test_double_has_half_the_lanes() -> None:
    single, double = (plan(CASES["plain"](dtype).spec, "avx512") for dtype in ("float32", "float64"))
    assert (single.real, double.real) == ("float", "double")
    assert single.width == 2 * double.width


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_matrix_units_are_for_bfloat16_alone(dtype: str) -> None:
    assert plan(CASES["plain"]("bfloat16").spec, "amx").core == "matrix"
    assert plan(CASES["plain"](dtype).spec, "amx").core == "lanes"


def test_unknown_instruction_set_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sve'.*avx512"):
        plan(CASES["plain"]("float32").spec, "sve")


def test_backward_takes_the_matrix_core_where_only_query_key_and_value_are_summed() -> None:
    spec = CASES["dense_additive"]("bfloat16").spec
    assert [backward_plan(spec, "amx", terms).core for terms in (False, True)] == ["matrix", "lanes"]
    assert backward_plan(CASES["plain"]("float32").spec, "amx", terms=False).core == "lanes"
