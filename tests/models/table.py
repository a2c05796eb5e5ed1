"""The table at the end of the run: what became of each model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

COLUMNS = ("model", "attention", "dtype", "target", "sites", "fused", "eager error", "fuse error", "mask")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = list(_rows(terminalreporter))
    names = [row[0] for row in found]
    rows = [COLUMNS, *sorted(found, key=lambda row: names.index(row[0]))]  # run in parallel, they come in any order
    if len(rows) == 1:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    terminalreporter.section("attention sites of real models; errors against float64")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        terminalreporter.write_line("  ".join([*cells, row[-1]]).rstrip())


def _rows(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, ...]]:
    """What the tests recorded; it travels with their reports, also from the processes of pytest-xdist."""
    for outcome in ("passed", "failed", "xfailed"):
        for report in terminalreporter.getreports(outcome):
            yield from (tuple(value) for name, value in report.user_properties if name == "row" and report.when == "call")
