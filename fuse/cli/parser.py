"""What can be typed. Nothing here waits for torch: values that only it knows are checked by those who use them."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import fuse
from fuse.errors import UnknownWord, did_you_mean

_EXAMPLES = """
examples:
  python -m fuse explain gpt2                            a transformers model type; no weights are allocated
  python -m fuse explain my_model.py:build               a function that returns (model, args)
  python -m fuse explain my_model.py:build --require-all for CI: exit status 1 where attention is not fused
  python -m fuse bench my_model.py:build                 eager, Inductor and fuse side by side
  python -m fuse doctor                                  what this machine can do, and what is missing
"""
_TARGET = "module:callable or file.py:callable, which returns (model, args), (model, kwargs) or both; or a transformers type"
DTYPES = ("float32", "bfloat16", "float16", "float64")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UnknownWord for a command or an option that there is not; exits where argparse does."""
    parser, commands = parsers()
    command = next(iter(arguments), "--help")
    if not command.startswith("-") and command not in commands:
        raise UnknownWord(command="", what="command", name=command, hint=did_you_mean(command, commands))
    args, unknown = parser.parse_known_args(arguments or [command])
    if unknown:
        known = re.findall(r"--[\w-]+", commands[command].format_help())
        what = "option" if unknown[0].startswith("-") else "place for"
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        raise UnknownWord(command=f"{command} ", what=what, name=unknown[0], hint=hint)
    return args


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Of all that is typed, and of each command."""
    prog = "torch-fuse" if Path(sys.argv[0]).name == "torch-fuse" else "python -m fuse"
    about = "What fuse does with a model, what that gains, and the kernels it has built."
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=about, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"torch-fuse {fuse.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _explain(commands.add_parser("explain", help="what of a model is fused, and why the rest is not: nothing is built or run"))
    _bench(commands.add_parser("bench", help="eager PyTorch, Inductor and fuse on a model: time, memory, error, first call"))
    commands.add_parser("kernels", help="list the kernels that were built, the newest first")
    _cache(commands.add_parser("cache", help="where kernels are kept, and how much they take"))
    _call(commands.add_parser("tune", help="measure on the GPU which tile sizes a model is fastest with, and keep that"))
    commands.add_parser("doctor", help="what this machine can do, and how to get what is missing")
    return parser, dict(commands.choices)


def _explain(parser: argparse.ArgumentParser) -> None:
    _call(parser)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--require-all", action="store_true", help="exit status 1 unless there is attention and all is fused")
    shown.add_argument("--passes", type=_count, nargs="?", const=1, metavar="N", help="what each pass made of site N (1)")
    shown.add_argument("--json", action="store_true", help="print all that is known as JSON")
    shown.add_argument("--html", type=Path, metavar="FILE", help="write a page")


def _bench(parser: argparse.ArgumentParser) -> None:
    _call(parser)
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--rounds", type=_count, default=10, metavar="N", help="timed calls of each; the ways take turns (10)")
    how.add_argument("--cold", action="store_true", help="with empty caches, as on a machine that has never seen the model")


def _call(parser: argparse.ArgumentParser) -> None:
    """A model, and how it is called."""
    parser.add_argument("model", metavar="TARGET", help=_TARGET)
    call = parser.add_argument_group("the call", "A function of yours is given those that are set, by these names.")
    call.add_argument("--length", type=_count, metavar="N", help="positions (1024, or what the model has)")
    call.add_argument("--batch", type=_count, metavar="N", help="texts or images (1)")
    call.add_argument("--dtype", choices=DTYPES, help="of weights and floating-point inputs")
    call.add_argument("--padding", choices=("left", "right"), help="texts of different lengths, filled up on that side")
    call.add_argument("--layers", type=_count, metavar="N", help="as many layers, to see it sooner")
    call.add_argument("--attention", choices=("eager", "sdpa", "flex_attention"), help="of transformers (its own choice)")
    call.add_argument("--train", action="store_true", help="as in training: with gradients and dropout")
    call.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 … (cpu)")
    call.add_argument("--target", metavar="NAME", help="what computes attention: auto, cpp, triton, reference (auto)")


def _cache(parser: argparse.ArgumentParser) -> None:
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--clear", action="store_true", help="delete them; they are built again when they are needed")
    about = "read all of it, and say what is broken, left over, or open to others; exit status 1 where something is broken"
    doing.add_argument("--check", action="store_true", help=about)
    about = "delete what is broken, left over, or was not used for DAYS, if given; what is being built stays"
    doing.add_argument("--prune", type=_days, nargs="?", const=math.inf, metavar="DAYS", help=about)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a whole number, 1 or more")
    return int(text)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days: give 30, say, or 0 for all")
    return days
