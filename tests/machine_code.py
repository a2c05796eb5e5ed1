"""What can be read off a compiled Triton kernel: spills, shared memory, matrix instructions, sizes of loops."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# An instruction, its address in a comment before it (NVIDIA) or none (AMD), perhaps under a predicate; or a label.
_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)([^;]*);")
_AMDGCN = re.compile(r"\s+([a-z]\w+)([^;]*)")
_LABEL = re.compile(r"(\.L\w+):")
_PRODUCT = re.compile(r"HGMMA|HMMA|UTC\w*MMA|DMMA|FFMA|v_mfma")


def read(files: Mapping[str, Path]) -> dict[str, Any]:
    """``files`` of a kernel by their kind.

    spills   instructions that move registers to memory and back (AMD: vector registers)
    shared   bytes of shared memory
    wgmma    whether products are Hopper's
    loops    instructions of every innermost loop with products, in the order of the code
    """
    shared = json.loads(files["json"].read_text())["shared"]
    if "amdgcn" in files:
        text = files["amdgcn"].read_text()
        spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        code = _instructions(text, _AMDGCN)
    else:
        tool = [_TOOLS / "nvdisasm", "-c", files["cubin"]]
        code = _instructions(subprocess.run(tool, capture_output=True, text=True, check=True).stdout, _SASS)
        spills = sum(opcode.startswith(("LDL", "STL")) for opcode, _ in code)
    wgmma = any(opcode.startswith("HGMMA") for opcode, _ in code)
    return {"spills": spills, "shared": shared, "wgmma": wgmma, "loops": _loops(code)}


def _instructions(text: str, pattern: re.Pattern[str]) -> list[tuple[str, int | None]]:
    """Opcodes, and the number of the instruction that each may jump back to."""
    labels: dict[str, int] = {}
    code: list[tuple[str, int | None]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif found := pattern.match(line):
            target = re.search(r"\.L\w+", found[2]) if re.match(r"BRA|s_c?branch", found[1]) else None
            code.append((found[1], labels.get(target[0]) if target else None))
    return code


def _loops(code: list[tuple[str, int | None]]) -> list[int]:
    spans = {(begin, end) for end, (_, begin) in enumerate(code) if begin is not None}
    products = [0]
    for opcode, _ in code:
        products.append(products[-1] + bool(_PRODUCT.match(opcode)))
    hot = {(a, b) for a, b in spans if products[b + 1] - products[a] >= 4}
    inner = {(a, b) for a, b in hot if not any((a, b) != (c, d) and a <= c and d <= b for c, d in hot)}
    return [b - a + 1 for a, b in sorted(inner)]
