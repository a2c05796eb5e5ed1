"""Programs that were reported in public, because a compiler computes another function or none: fuse computes theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reported_programs import NOT_RUN, REPORTS, Report

import fuse

DECLINED = {196468}  # no attention at all: what Inductor must not undo
CROPPED = {136232, 139462}
_OF_2_11 = pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 refuses BlockMasks that were cropped")


def case(report: Report) -> Any:
    marks = [pytest.mark.compiler] if report.number in DECLINED else [_OF_2_11] if report.number in CROPPED else []
    return pytest.param(report, id=report.name, marks=marks)


@pytest.mark.parametrize("report", [case(r) for r in REPORTS])
def test_a_reported_program_computes_what_it_does_without_a_compiler(report: Report) -> None:
    inner = "inductor" if report.number in DECLINED else "aot_eager"
    assert report.error("fuse", {"inner": inner, "target": "reference"}) < 1e-5
    found = fuse.report()
    assert len(found.sites) == 1
    assert found.recovered == (0 if report.number in DECLINED else 1)


def test_the_document_has_every_report() -> None:
    text = (Path(__file__).parent.parent / "docs/reported.md").read_text()
    assert [r for r in (*REPORTS, *NOT_RUN) if f"| [#{r.number}](" not in text or f" | {r.title} | " not in text] == []
