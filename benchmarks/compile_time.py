"""Compile time of GPT-2 small: fuse beside Inductor, with empty caches and with the caches they left.

    python benchmarks/compile_time.py [--layers 12] [--repeats 1]

Bars: cold, fuse takes at most 1.3 times what Inductor takes; warm, it builds nothing; its kernels are checked and timed in at
most a tenth of what it takes without, cold, and a hundredth, warm. Each measurement is the first call in a process of its own.
The result is kept under benchmarks/results/. Exit status 1 where a bar is missed.
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

# What is compared, and how much more the first may take, cold and warm; None: anything.
BARS = {("fuse", "inductor"): (1.3, None), ("fuse", "unchecked"): (1.1, 1.01)}
WAYS = {"inductor": {}, "fuse": {"FUSE_QUALIFY": "once"}, "unchecked": {"FUSE_QUALIFY": "never"}}

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
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "FUSE_CACHE_DIR": str(caches / "fuse")}
    environment = os.environ | folders | WAYS[way]
    command = [sys.executable, "-c", FIRST_CALL, "inductor" if way == "inductor" else "fuse", str(layers)]
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
    cold: dict[str, list[float]] = {way: [] for way in WAYS}
    warm: dict[str, list[float]] = {way: [] for way in WAYS}
    rebuilt: set[str] = set()
    for _ in range(args.repeats):
        for way in WAYS:  # they alternate, so that a busy spell of the machine does not meet one of them alone
            print(f"{way}: two processes, some minutes on a slow machine …", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                caches = Path(folder)
                cold[way].append(first_call(way, args.layers, caches))
                before = built(caches)
                warm[way].append(first_call(way, args.layers, caches))
                rebuilt |= {path for path, time in built(caches).items() if before.get(path) != time}
    result = {"layers": args.layers, "cold": cold, "warm": warm, "rebuilt": len(rebuilt), "machine": machine.facts()}
    path = Path(__file__).parent / "results" / f"compile_time-{machine.slug()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    missed = show(args.layers, {"cold": cold, "warm": warm})
    print(f"files built with a warm cache: {len(rebuilt)}")
    return int(missed or bool(rebuilt))


def show(layers: int, seconds: dict[str, dict[str, list[float]]]) -> bool:
    """Prints medians, and ratios beside their bars; whether one is missed."""
    print(f"GPT-2, {layers} layers, first call in seconds " + "".join(f"{way:>11}" for way in WAYS))
    medians = {name: {way: statistics.median(of[way]) for way in WAYS} for name, of in seconds.items()}
    for name, of in medians.items():
        print(f"{name:40} " + "".join(f"{of[way]:11.2f}" for way in WAYS))
    missed = False
    for (way, other), bars in BARS.items():
        for (name, of), bar in zip(medians.items(), bars, strict=True):
            ratio = of[way] / of[other]
            missed |= bar is not None and ratio > bar
            print(f"{way} / {other}, {name}: {ratio:.3f}" + (f", at most {bar}" if bar is not None else ""))
    return missed


if __name__ == "__main__":
    sys.exit(main())
