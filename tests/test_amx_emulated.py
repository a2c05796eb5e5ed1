"""The AMX core, with its tile instructions emulated: the same source, the same tiles, on any machine with AVX512-BF16."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from problems import Problem
from specs import CASES
from together import asked, for_queries, together

from fuse.targets.cpp import compiler, cpu, launch, render
from fuse.targets.cpp.plan import backward_plan, plan
from fuse.targets.cpp.render_backward import render_backward

pytestmark = pytest.mark.compiler
needs_avx512_bf16 = pytest.mark.skipif(cpu.matrix_unit() is None, reason="no AVX512-BF16")

# Each a path of its own: tails of queries, keys and features, one and two tiles, masks, weights, rows that are redone.
NAMES = (
    "vit_length", "head_dim_80", "value_narrower_than_key", "value_wider_than_key", "cross_attention", "grouped_query",
    "causal_long", "window", "left_padding_and_causal", "dense_additive", "alibi", "two_extra_logits",
    "weight_masked_after_softmax", "key_stored_transposed", "causal_more_queries_than_keys",
    "retention", "linear_attention_causal", "weight_without_a_softmax",
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> dict[str, launch.CppKernel]:
    names = [params["name"] for params in asked(request, test_emulated_tiles_are_within_twice_the_error_of_eager)]
    with together():
        return {name: kernel(CASES[name]("bfloat16")) for name in names}


def kernel(p: Problem) -> launch.CppKernel:
    with for_queries(p.q_len):
        return launch.CppKernel(p.spec, launch.build(p.spec, "amx_emulated"))


@needs_avx512_bf16
@pytest.mark.parametrize("name", NAMES)
def test_emulated_tiles_are_within_twice_the_error_of_eager(kernels: dict[str, launch.CppKernel], name: str) -> None:
    problem = CASES[name]("bfloat16")
    problem.check(kernels[name](problem.operands, problem.sizes))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not x86-64")
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_tile_instructions_assemble(tmp_path: Path, way: str) -> None:
    """What runs on AMX itself: every instruction of the emulation is there, in asm that this compiler takes."""
    spec = CASES["causal"]("bfloat16").spec
    wanted, of_backward = (True, True, True), backward_plan(spec, "amx", terms=False)
    text = render.render(spec, plan(spec, "amx")) if way == "forward" else render_backward(spec, wanted, of_backward)
    source = tmp_path / "amx.cpp"
    source.write_text(text)
    flags = ["-std=c++17", "-O3", "-w", "-fopenmp", "-march=sapphirerapids", "-S", "-o", "-"]
    done = subprocess.run([*compiler.cxx_compiler(), *flags, str(source)], capture_output=True, text=True, check=True)
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tilestored", "tdpbf16ps", "tilerelease"):
        assert instruction in done.stdout, instruction


# One product of two tiles, emulated, through the interface that the core uses.
_PRODUCT = """
extern "C" void product(const Bf16* a, const uint32_t* b, float* c, int rows, int cols, int pairs) {
    Matrix matrix;
    matrix.step<true>(a, 2 * pairs, b, cols, c, cols, rows, cols, pairs);
    matrix.flush();
}
"""


@needs_avx512_bf16
@pytest.mark.parametrize(("rows", "cols", "depth"), [(16, 16, 32), (32, 16, 64), (16, 32, 32), (32, 32, 96)])
def test_tile_product_adds_pairs_in_float(tmp_path: Path, rows: int, cols: int, depth: int) -> None:
    spec = CASES["plain"]("bfloat16").spec
    source, binary = tmp_path / "product.cpp", tmp_path / "product.so"
    source.write_text(render.render(spec, plan(spec, "amx_emulated")) + _PRODUCT)
    flags = ["-std=c++17", "-O1", "-w", "-march=native", "-shared", "-fPIC"]
    subprocess.run([*compiler.cxx_compiler(), *flags, str(source), "-o", str(binary)], check=True)
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(depth, cols).bfloat16()
    c = torch.randn(rows, cols)
    expected = c.double() + a.double() @ b.double()
    pairs = b.view(depth // 2, 2, cols).transpose(1, 2).contiguous()
    ctypes.CDLL(str(binary)).product(
        *map(ctypes.c_void_p, (a.data_ptr(), pairs.data_ptr(), c.data_ptr())), rows, cols, depth // 2
    )
    assert (c.double() - expected).abs().max() < 1e-4


@needs_avx512_bf16
def test_emulation_faults_on_an_unconfigured_tile(tmp_path: Path) -> None:
    """The instructions fault there too; a core that forgets to configure must not pass its tests."""
    spec = CASES["plain"]("bfloat16").spec
    source, binary = tmp_path / "fault.cpp", tmp_path / "fault"
    source.write_text(render.render(spec, plan(spec, "amx_emulated")) + "\nint main() { tile_zero<0>(); }\n")
    subprocess.run(
        [*compiler.cxx_compiler(), "-std=c++17", "-O1", "-w", "-march=native", str(source), "-o", str(binary)], check=True
    )
    done = subprocess.run([str(binary)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "tile is not configured" in done.stderr
