"""What becomes of programs that were reported in public: without fuse, and with it. Prints docs/reported.md.

    python benchmarks/reported.py > docs/reported.md

Each program of tests/reported_programs.py is compiled by Inductor, which for FlexAttention means its own template, and by fuse
with Inductor behind it, and compared with the same program without a compiler. No cache of torch is used.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from reported_programs import NOT_RUN, REPORTS, NotRun, Report
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import fuse

RIGHT = 1e-3  # another function is off by a tenth and more; the most that roundings do is float16's last digit
TEXT = """# What was reported

Public reports about attention under `torch.compile`: computed as another function, refused, or missed. Each is a small \
program of our own ([its source](../tests/reported_programs.py)), compiled by Inductor alone, which for FlexAttention means \
Inductor's template for it, and by fuse with Inductor behind it. Errors are the largest difference from the same program \
without a compiler, as a share of the largest value; for training of the result and of all gradients. "By a pattern": one of \
Inductor's own patterns of attention took it. torch {torch}, CPU; `python benchmarks/reported.py` prints this page, and \
tests/test_reported.py holds it.

| report | what it is about | Inductor | fuse | fused/sites |
|---|---|---|---|---|"""


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    print(TEXT.format(torch=torch.__version__.partition("+")[0]))
    for report in sorted((*REPORTS, *NOT_RUN), key=lambda report: report.number):
        link = f"[#{report.number}](https://github.com/pytorch/pytorch/issues/{report.number})"
        print(f"| {link} | {report.title} | {' | '.join(_cells(report))} |", flush=True)


def _cells(report: Report | NotRun) -> tuple[str, str, str]:
    """What Inductor does, what fuse does, and how much of it is fused."""
    if isinstance(report, NotRun):
        return report.reason, "-", "-"
    alone = _outcome(report, "inductor")
    by_a_pattern = ", by a pattern" if counters["inductor"]["fuse_attention"] else ""
    with_fuse = _outcome(report, "fuse")
    found = fuse.report()
    reasons = "".join(f": {site.reason}" for site in found.sites if site.reason)
    return alone + by_a_pattern, with_fuse, f"{found.fused}/{len(found.sites)}{reasons}" if found.sites else "-"


def _outcome(report: Report, backend: str) -> str:
    torch._dynamo.reset()
    fuse.reset()
    counters.clear()
    try:
        with fresh_cache():
            error = report.error(backend)
    except Exception as raised:  # what a compiler raises is a result here
        lines = [line for line in str(raised).splitlines() if line and not line.startswith("backend=")]
        said = lines[0].removeprefix("LoweringException: ").partition(". ")[0].removesuffix(".")
        named = said if "Error: " in said else f"{type(raised).__name__}: {said}"
        return f"raises {textwrap.shorten(named, 100, placeholder=' …')}"
    return f"{error:.0e}".removesuffix("e+00") if error < RIGHT else f"**wrong by {error:.1f}**"


if __name__ == "__main__":
    main()
