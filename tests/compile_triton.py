"""Compiles Triton kernels for GPUs that need not be there, and prints what can be read off the code as JSON.

python compile_triton.py SPEC:DTYPE:ARCH …          ARCH: 80, 90, 100 (NVIDIA), gfx942 (AMD)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from specs import CASES, RANDOM_CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fuse.planner_triton import architecture
from fuse.runtime.triton import TritonKernel

_TYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "int32": "i32"}


def compiled(name: str, dtype: str, arch: str) -> dict[str, Any]:
    spec = (CASES | RANDOM_CASES)[name](dtype).spec
    kernel = TritonKernel(spec, architecture(f"sm_{arch}" if arch.isdigit() else arch))
    plan, function = kernel.plan, kernel.function
    types = dict.fromkeys(function.arg_names, "i32") | {"to": f"*{_TYPES[spec.out_dtype]}", "lse": "*fp32"}
    types |= {f"p{i}": f"*{_TYPES.get(o.dtype, 'u8')}" for i, o in enumerate(spec.operands)}
    constants = {"HAS_LSE": False, "PRECISION": "ieee", "BM": plan.block_q, "BN": plan.block_k, f"to_{spec.batch + 1}": 1}
    constants |= {f"s{i}_{o.rank - 1}": 1 for i, o in enumerate(spec.operands[:3])}
    aligned = ["to", "p0", "p1", "p2", *(f"s{i}_{d}" for i, o in enumerate(spec.operands[:3]) for d in range(o.rank - 1))]
    place = {n: i for i, n in enumerate(function.arg_names)}
    signature = {n: "constexpr" if n in constants else t for n, t in types.items()}
    divisible = {(place[n],): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(function, signature, {(place[n],): v for n, v in constants.items()}, divisible)
    target = GPUTarget("cuda", int(arch), 32) if arch.isdigit() else GPUTarget("hip", arch, 64)
    binary = triton.compile(source, target=target, options={"num_warps": plan.warps, "num_stages": plan.stages})
    found: dict[str, Any] = {"shared": binary.metadata.shared}
    if "ptx" in binary.asm:
        ptx = binary.asm["ptx"]
        found |= {"wgmma": "wgmma" in ptx, "spilled": _spilled(ptx, arch)}
    return found


def _spilled(ptx: str, arch: str) -> int:
    """Bytes that ptxas spills; Triton itself discards its report."""
    name = "ptxas-blackwell" if int(arch) >= 100 else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        suffix = "a" if arch in ("90", "100") else ""
        command = [ptxas, "-v", f"-arch=sm_{arch}{suffix}", source, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


if __name__ == "__main__":
    print(json.dumps({asked: compiled(*asked.split(":")) for asked in sys.argv[1:]}))
