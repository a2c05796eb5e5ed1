"""Environments of other versions of torch and Python, and the tests that a version can break, in each of them.

    python tests/versions.py                                       # those of ENVIRONMENTS
    python tests/versions.py --torch 2.11.0 --python python3.12 -- tests/test_op.py -k vmap

They are made under build/versions/, and kept. An interpreter that is not there is named and left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED, NEWEST = "pinned", "newest"
# torch and Python, beside the one of `make test`
ENVIRONMENTS = (
    ("2.11.0", "python3.11"),
    (NEWEST, "python3.11"),
    (NEWEST, "python3.12"),
    (NEWEST, "python3.13"),
)
# What reads torch's graphs, calls its private parts or is called by it; of the many tests of kernels, the small ones; of those
# of models, the ones on several ranks. Tests of sequences that lie on several need no compiler: the first selection has them.
READ = ("torch_private", "torch_private_graphs", "backend", "op", "func", "flex", "varlen", "inner", "transform", "sharding")
SMALL = ("cpp", "triton")
SELECTION = (
    ("-m", "not compiler and not triton and not models"),
    ("-m", "compiler or triton", *(f"tests/test_{name}.py" for name in READ)),
    (*(f"tests/test_{name}.py" for name in SMALL), "-k", "small"),
    ("-m", "compiler", "tests/test_weights.py", "-k", "not kernel_writes"),
    ("tests/models/test_distributed.py",),
)


@dataclass(frozen=True)
class Environment:
    """``torch``: a version, PINNED by constraints.txt, or the NEWEST that pip finds; ``python``: a command."""

    torch: str
    python: str

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "versions" / f"torch-{self.torch}-{Path(self.python).name}"

    @property
    def interpreter(self) -> str:
        return str(self.folder / "bin" / "python")

    def make(self) -> None:
        """As `make venv`: torch first and alone, else another package may take another one."""
        if not Path(self.interpreter).exists():
            subprocess.run((self.python, "-m", "venv", self.folder), check=True)
        (pinned,) = (pin for pin in _pinned() if pin.startswith("torch=="))
        self._install("--upgrade", {PINNED: pinned, NEWEST: "torch"}.get(self.torch, f"torch=={self.torch}"))
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(self._pins()))
        self._install("--constraint", str(constraints), "--editable", ".[test,triton]")

    def _pins(self) -> list[str]:
        """Those of constraints.txt, but for another torch, which asks for others, such as the Triton that it was built for."""
        if self.torch == PINNED:
            return _pinned()
        told = self._says(
            "from importlib.metadata import *; print('torch==' + version('torch'), *requires('torch'), sep='\\n')"
        )
        of_torch = {re.split(r"[^\w.-]", line)[0].lower() for line in told.splitlines()}
        return [told.splitlines()[0], *(pin for pin in _pinned() if pin.split("==")[0].lower() not in of_torch)]

    def _install(self, *what: str) -> None:
        subprocess.run((self.interpreter, "-m", "pip", "install", "--quiet", *what), check=True, cwd=ROOT)

    def _says(self, code: str) -> str:
        return subprocess.run((self.interpreter, "-c", code), check=True, capture_output=True, text=True).stdout.strip()

    def versions(self) -> str:
        code = "import platform, torch, triton; print(platform.python_version(), torch.__version__, triton.__version__)"
        return "Python {}, torch {}, Triton {}".format(*self._says(code).split())

    def test(self, arguments: Sequence[str]) -> str:
        """The line in which pytest sums up, after all that it prints."""
        command = (self.interpreter, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *arguments)
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
        assert run.stdout is not None
        last = ""
        for line in run.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        return last if run.wait() == 0 else f"FAILED: {last}"


def _pinned() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]


def _runs(python: str) -> bool:
    """A command may be there that finds no interpreter behind it."""
    return shutil.which(python) is not None and subprocess.run((python, "-c", ""), capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help=f"a version, {PINNED!r} or {NEWEST!r}")
    parser.add_argument("--python", help="a command, such as python3.12")
    parser.add_argument("tests", nargs="*", help="arguments of pytest instead of the selection, after --")
    args = parser.parse_args()
    chosen = [Environment(args.torch or torch, args.python or python) for torch, python in ENVIRONMENTS]
    summary = []
    for environment in dict.fromkeys(chosen):
        if not _runs(environment.python):
            summary.append(f"{environment.python} is not there: torch {environment.torch} was not tested with it")
            continue
        environment.make()
        summary.append(environment.versions())
        summary += [f"    {environment.test(tests)}" for tests in ([args.tests] if args.tests else SELECTION)]
    print("", *summary, sep="\n")
    return int(any("FAILED" in line or "is not there" in line for line in summary))


if __name__ == "__main__":
    sys.exit(main())
