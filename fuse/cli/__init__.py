"""The shell: ``python -m fuse``, or ``torch-fuse``. One command a file, which is imported when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from typing import Any

from fuse.cli.parser import parsed
from fuse.errors import FuseError, NoTorch

WRONG, INTERRUPTED = 2, 130  # exit statuses, as shells and argparse have them


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 all is well, 1 what was asked for is not so (--require-all, --check), 2 a mistake in the question."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # a program does not look for modules in the current folder, as ``python -m`` does
    try:
        args = parsed(sys.argv[1:] if arguments is None else arguments)
        return int(_command(args.command).run(args))
    except FuseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough, as head has: https://docs.python.org/3/library/signal.html
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _command(name: str) -> Any:
    """Its module. Who waits at a terminal for torch to be imported, some seconds, is told. Raises NoTorch."""
    from fuse.cli.console import work

    try:
        with work() if "torch" not in sys.modules and sys.stderr.isatty() else nullcontext(str) as say:
            say("importing torch")
            return importlib.import_module(f"fuse.cli.{name}")
    except ImportError as error:
        needs = ", ".join(need for need in metadata.requires("torch-fuse") or () if "extra" not in need)
        found = ", ".join(f"{d.name} {d.version}" for d in metadata.distributions() if d.name in ("torch", "sympy", "rich"))
        raise NoTorch(error=error, needs=needs, found=found or "none of them") from error
