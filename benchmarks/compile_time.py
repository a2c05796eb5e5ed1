"""Compile time of GPT-2 small: fuse beside Inductor, with empty caches and with the caches they left.

    python benchmarks/compile_time.py [--layers 12] [--repeats 1]

Bars: cold, fuse takes at most 1.3 times what Inductor takes; warm, it builds nothing. Each measurement is the first call in
a process of its own. The result is kept under benchmarks/results/. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

BAR = 1.3

FIRST_CALL = """
import sys, time, torch
from transformers import GPT2Config, GPT2LMHeadModel
way, layers = sys.argv[1], int(sys.argv[2])
model = GPT2LMHeadModel(GPT2Config(n_layer=layers, attn_implementation="eager")).eval()
tokens = torch.randint(0, 50257, (1, 128))
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # Dynamo's own start is not what is measured
import torch._inductor.compile_fx
start = time.perf_counter()
with torch.inference_mode():
    torch.compile(model, backend=way)(tokens)
print(time.perf_counter() - start)
"""


def first_call(way: str, layers: int, caches: Path) -> float:
    """Seconds until the first result, in a new process with its caches under ``caches``."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "FUSE_CACHE_DIR": str(caches / "fuse")}
    command = [sys.executable, "-c", FIRST_CALL, way, str(layers)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def built(caches: Path) -> dict[str, int]:
    """Every file of fuse's cache and when it was last written."""
    return {str(path): path.stat().st_mtime_ns for path in (caches / "fuse").rglob("*") if path.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1, help="the median of so many is shown")
    args = parser.parse_args()
    cold: dict[str, list[float]] = {"inductor": [], "fuse": []}
    warm: dict[str, list[float]] = {"inductor": [], "fuse": []}
    rebuilt: set[str] = set()
    for _ in range(args.repeats):
        for way in cold:  # they alternate, so that a busy spell of the machine does not meet one of them alone
            with tempfile.TemporaryDirectory() as folder:
                caches = Path(folder)
                cold[way].append(first_call(way, args.layers, caches))
                before = built(caches)
                warm[way].append(first_call(way, args.layers, caches))
                rebuilt |= {path for path, time in built(caches).items() if before.get(path) != time}
    print(f"GPT-2, {args.layers} layers, first call in seconds   inductor    fuse   ratio")
    ratio = 0.0
    for name, seconds in (("warm", warm), ("cold", cold)):
        inductor, fuse = (statistics.median(seconds[way]) for way in ("inductor", "fuse"))
        ratio = fuse / inductor
        print(f"{name:45} {inductor:8.1f} {fuse:7.1f} {ratio:7.2f}")
    result = {"layers": args.layers, "cold": cold, "warm": warm, "rebuilt": len(rebuilt), "machine": machine.facts()}
    path = Path(__file__).parent / "results" / f"compile_time-{machine.slug()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"cold, at most {BAR}: {'yes' if ratio <= BAR else 'NO'}; files built with a warm cache: {len(rebuilt)}")
    return int(ratio > BAR or bool(rebuilt))


if __name__ == "__main__":
    sys.exit(main())
