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
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fuse.bench import WAYS, Case, Comparison, Failed, Measured, Ways
from fuse.models import ModelCall, to
from fuse.report.subject import machine

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


def made(name: str, layers: int, dtype: str) -> ModelCall:
    """In each process, with the same weights and inputs."""
    model, inputs = MODELS[name][0](layers)
    return to(ModelCall(model.eval(), (), inputs), getattr(torch, dtype))


# ------------------------------------------------------------------------------------------------------------- a table


HEADER = ("model", "dtype", "fused/sites", "mask", "ms", "extra peak, MB", "error against float64")


def cells(case: Case, found: Comparison) -> tuple[str, ...]:
    name, layers, dtype = case.arguments
    if failed := [f"{way}: {x.why}" for way, x in found.found.items() if isinstance(x, Failed)]:
        return f"{name}, {layers} layers", dtype, "", "", *failed
    shown = [x for x in found.found.values() if isinstance(x, Measured)]
    report = shown[-1].report
    return (
        f"{name}, {layers} layers",
        dtype,
        f"{report.fused}/{len(report.sites)}",
        "; ".join(dict.fromkeys(site.mask or "none" for site in report.sites if site.fused)),
        " / ".join(f"{1000 * found.seconds[way]:.0f}" for way in WAYS),
        " / ".join("?" if m.peak is None else f"{m.peak / 2**20:.0f}" for m in shown),
        " / ".join(f"{m.error:.1e}" for m in shown),
    )


def show(rows: Sequence[tuple[Case, Comparison]], markdown: bool) -> None:
    table = [HEADER, *(cells(case, found) for case, found in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    print(f"\nThree numbers are {', '.join(WAYS)}. {machine()}, torch {torch.__version__}.\n")
    for number, line in enumerate(table):
        text = (" | " if markdown else "  ").join(cell.ljust(width) for cell, width in zip(line, widths, strict=False))
        print(f"| {text} |" if markdown else text.rstrip())
        if markdown and number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\nKernels:")
    reports = [found.found["fuse"].report for _, found in rows if isinstance(found.found["fuse"], Measured)]
    for path in dict.fromkeys(path for report in reports for site in report.sites for path in site.kernels.values()):
        print("  ", path)


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
    rows = []
    with Ways() as ways:
        for name in args.models:
            for dtype in args.dtypes:
                case = Case(made, (name, args.layers or MODELS[name][1], dtype))
                print(f"{name}, {case.arguments[1]} layers, {dtype} …", file=sys.stderr, flush=True)
                rows.append((case, ways.compare(case, CALLS)))
                first = [f"{way} {x.first:.0f} s" for way, x in rows[-1][1].found.items() if isinstance(x, Measured)]
                print(f"   first call: {', '.join(first)}", file=sys.stderr, flush=True)
    show(rows, args.markdown)


if __name__ == "__main__":
    main()
