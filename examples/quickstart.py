"""Quickstart: unmodified transformers models, compiled with ``backend="fuse"``, beside eager PyTorch and Inductor.

    python examples/quickstart.py                          every model in every dtype: some minutes on two cores
    python examples/quickstart.py --models gpt2 --dtypes bfloat16
    python examples/quickstart.py --layers 2               fewer layers of each model, to see it sooner
    python examples/quickstart.py --markdown               the table as README.md shows it

Each way runs in a process of its own, so that peak memory is its own; the timed calls of the three alternate. Without
AVX-512, x86 processors get no bfloat16 unless ``--dtypes`` asks for it: eager took 17 s for one layer of GPT-2 there.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

WAYS = ("eager", "inductor", "fuse")
CALLS = 5


# ------------------------------------------------------------------------------------------------------------ models


def gpt2(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=layers, attn_implementation="eager")
    return GPT2Model(config), {"input_ids": tokens(config, 1, 1024)}


def llama(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """16 heads of queries share 4 of keys and values."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaModel(config), {"input_ids": tokens(config, 1, 1024)}


def mistral(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Each token sees the 256 before it."""
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, sliding_window=256, attn_implementation="eager",
    )  # fmt: skip
    return MistralModel(config), {"input_ids": tokens(config, 1, 1024)}


def bert(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Four texts, padded to the longest."""
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=layers, attn_implementation="eager")
    lengths = torch.tensor([[512], [384], [256], [128]])
    return BertModel(config), {"input_ids": tokens(config, 4, 512), "attention_mask": (torch.arange(512) < lengths).long()}


def tokens(config: Any, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length))


Build = Callable[[int], tuple[Any, dict[str, torch.Tensor]]]
MODELS: dict[str, tuple[Build, int]] = {"gpt2": (gpt2, 12), "llama": (llama, 2), "mistral": (mistral, 2), "bert": (bert, 2)}


@dataclass(frozen=True)
class Case:
    model: str
    layers: int
    dtype: str

    def build(self, dtype: str) -> tuple[Any, dict[str, torch.Tensor]]:
        """The same weights and inputs in every process."""
        torch.manual_seed(0)
        model, inputs = MODELS[self.model][0](self.layers)
        return model.eval().to(getattr(torch, self.dtype)).to(getattr(torch, dtype)), inputs


# ---------------------------------------------------------------------------------------- one process, one way to run


@dataclass(frozen=True)
class Measured:
    """first_s: the first call; peak_mb: what one call adds to the process; error: relative, against float64."""

    first_s: float
    peak_mb: float
    error: float
    sites: int = 0
    fused: int = 0
    masks: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


def worker(pipe: Connection, way: str) -> None:
    """For each case, with the path of its exact result: Measured, then the seconds of one call for each "call"."""
    with torch.inference_mode():
        while (task := pipe.recv()) is not None:
            case, exact = task
            run = prepare(case, way, exact)
            first_s, output = timed(run)
            error = relative_error(output, torch.load(exact))
            del output
            pipe.send(Measured(first_s, peak_of(run), error, **(what_fuse_did() if way == "fuse" else {})))
            while pipe.recv() == "call":
                pipe.send(timed(run)[0])


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    output = run()
    return time.perf_counter() - start, output


def prepare(case: Case, way: str, exact: Path) -> Callable[[], torch.Tensor]:
    if way == "eager":  # the exact result: float64, from the weights as rounded to the case's dtype
        model, inputs = case.build("float64")
        torch.save(model(**inputs).last_hidden_state, exact)
    model, inputs = case.build(case.dtype)
    if way != "eager":
        torch.compiler.reset()
        model = torch.compile(model, backend=way)
    return lambda: model(**inputs).last_hidden_state


def what_fuse_did() -> dict[str, Any]:
    import fuse

    report = fuse.report()
    fuse.reset()
    masks = dict.fromkeys(site.mask or "none" for site in report.sites if site.fused)
    kernels = dict.fromkeys(str(path) for site in report.sites for path in site.kernels.values())
    return {"sites": len(report.sites), "fused": report.fused, "masks": tuple(masks), "kernels": tuple(kernels)}


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(output.double() - exact) / torch.linalg.vector_norm(exact)).item()


def peak_of(call: Callable[[], object]) -> float:
    """Megabytes that ``call`` needs at its peak beyond what the process holds; nan where the system does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    call()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept from earlier calls would hide the need for it
    clear.write_text("5")  # resets the high-water mark
    before = read_kb(status, "VmRSS")
    call()
    return (read_kb(status, "VmHWM") - before) / 1024


def read_kb(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


# ------------------------------------------------------------------------------------------------- all ways, a table


@dataclass(frozen=True)
class Row:
    case: Case
    measured: dict[str, Measured]
    milliseconds: dict[str, float]


def start(way: str) -> Connection:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=worker, args=(theirs, way), daemon=True).start()
    theirs.close()  # else the death of the worker would go unnoticed
    return ours


def measure(case: Case, pipes: dict[str, Connection]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        task = (case, Path(folder) / "exact.pt")
        pipes["eager"].send(task)
        measured = {"eager": pipes["eager"].recv()}
        for way in ("inductor", "fuse"):  # both compile at the same time
            pipes[way].send(task)
        measured |= {way: pipes[way].recv() for way in ("inductor", "fuse")}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(CALLS):
        for way in WAYS:
            pipes[way].send("call")
            seconds[way].append(pipes[way].recv())
    for pipe in pipes.values():
        pipe.send("done")
    return Row(case, measured, {way: 1000 * statistics.median(times) for way, times in seconds.items()})


HEADER = ("model", "dtype", "fused/sites", "mask", "ms", "extra peak, MB", "error against float64")


def cells(row: Row) -> tuple[str, ...]:
    ours = row.measured["fuse"]
    shown = [row.measured[way] for way in WAYS]
    return (
        f"{row.case.model}, {row.case.layers} layers",
        row.case.dtype,
        f"{ours.fused}/{ours.sites}",
        "; ".join(ours.masks),
        " / ".join(f"{row.milliseconds[way]:.0f}" for way in WAYS),
        " / ".join(f"{m.peak_mb:.0f}" for m in shown),
        " / ".join(f"{m.error:.1e}" for m in shown),
    )


def show(rows: Sequence[Row], markdown: bool) -> None:
    table = [HEADER, *map(cells, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    print(f"\nThree numbers are {', '.join(WAYS)}. {machine()}\n")
    for number, line in enumerate(table):
        text = (" | " if markdown else "  ").join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {text} |" if markdown else text.rstrip())
        if markdown and number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\nKernels:")
    for path in dict.fromkeys(path for row in rows for path in row.measured["fuse"].kernels):
        print("  ", path)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{cpu}, {os.cpu_count()} threads, torch {torch.__version__}."


def default_dtypes() -> list[str]:
    """Those in which eager PyTorch has fast products on this processor."""
    slow = platform.machine() in ("x86_64", "AMD64") and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return ["float32"] if slow else ["bfloat16", "float32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=default_dtypes())
    parser.add_argument("--layers", type=int, help="of each model, instead of 12 for GPT-2 and 2 for the others")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    pipes = {way: start(way) for way in WAYS}
    rows = []
    for name in args.models:
        for dtype in args.dtypes:
            case = Case(name, args.layers or MODELS[name][1], dtype)
            print(f"{name}, {case.layers} layers, {dtype} …", file=sys.stderr, flush=True)
            rows.append(measure(case, pipes))
            first = ", ".join(f"{way} {rows[-1].measured[way].first_s:.0f} s" for way in WAYS)
            print(f"   first call: {first}", file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    show(rows, args.markdown)


if __name__ == "__main__":
    main()
