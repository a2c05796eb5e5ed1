"""How much of the attention of models nobody here wrote is fused; docs/coverage.md has its tables from here.

    python benchmarks/coverage.py eager.jsonl sdpa.jsonl training.jsonl      # writes the tables, keeps what they are made of

Each file is one run of a harness that builds models from their configs, counts in eager which softmaxes (or calls of SDPA)
stand between two products, compiles, and compares with eager, in doubt with float64: a JSON object for each model. For its
``--counter`` this module has ``coverage:count``, which tells what became of the sites of a process so far.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
from timing import keep

import fuse

DOCUMENT = Path(__file__).parent.parent / "docs" / "coverage.md"
BEGIN, END = "<!-- {}: made by benchmarks/coverage.py -->", "<!-- end of {} -->"


def count() -> dict[str, int]:
    """Sites with a softmax that were fused, those without one, by what they run, and reasons of those that were not."""
    sites = fuse.report().sites
    found = Counter({"fused": sum(s.recovered and s.spec is not None and s.spec.softmax for s in sites)})
    found["without a softmax"] = sum(s.recovered and s.spec is not None and not s.spec.softmax for s in sites)
    found["by the reference"] = sum(s.by_reference for s in sites)
    found.update(f"{s.reason.name}: {type(s.reason).message.format(detail='…')}" for s in sites if s.reason is not None)
    return dict(found)


@dataclass(frozen=True)
class Model:
    """``reasons``: why sites were left, how many of each."""

    name: str
    sites: int
    fused: int
    wrong: str
    reasons: dict[str, int]


@dataclass(frozen=True)
class Series:
    """One run of the harness: models that ran in eager and compiled, and those that did not, by what they failed in."""

    attention: str
    dtype: str
    training: bool
    by: str
    models: tuple[Model, ...]
    failed: dict[str, int]

    @property
    def sites(self) -> int:
        return sum(m.sites for m in self.models)

    @property
    def fused(self) -> int:
        return sum(m.fused for m in self.models)


def series(path: Path) -> Series:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ran, first = [r for r in rows if r["status"] == "ok"], rows[0]
    kind = "sdpa" if first["set"].endswith("sdpa") else "softmax"
    by = "reference" if any((r.get("counter_extra") or {}).get("by the reference") for r in ran) else "kernels"
    failed = Counter(str(r["status"]).replace("_", " ") for r in rows if r["status"] != "ok")
    models = tuple(_model(r, kind) for r in ran if (r.get("sites") or {}).get(kind))
    return Series(first["set"].partition("-")[2], first["dtype"], first["train"], by, models, dict(failed))


def _model(row: dict[str, Any], kind: str) -> Model:
    sites = row["sites"][kind]
    reasons = {name: n for name, n in (row.get("counter_extra") or {}).items() if ": " in name and n}
    wrong = str(row.get("why")) if row.get("correct") is False and row.get("deterministic") else ""
    return Model(row["name"].split("/")[1], sites, min(sites, row.get("fused", 0)), wrong, reasons)


def totals(found: list[Series]) -> Iterator[str]:
    yield "| attention | dtype | run by | sites in models that run | fused | share | wrong outputs |"
    yield "|---|---|---|---|---|---|---|"
    for s in found:
        wrong = ", ".join(m.name for m in s.models if m.wrong) or "none"
        attention = s.attention + ", training" * s.training
        yield f"| {attention} | {s.dtype} | {s.by} | {s.sites} | {s.fused} | {100 * s.fused / s.sites:.1f} % | {wrong} |"


def left(s: Series) -> Iterator[str]:
    """What the first series leaves, by reason; a site that the graph does not hold as one has none."""
    yield "| models | sites left | reasons of their sites |"
    yield "|---|---|---|"
    groups: dict[tuple[str, ...], list[Model]] = {}
    for m in s.models:
        if m.fused < m.sites:
            groups.setdefault(tuple(sorted(map(_said, m.reasons))), []).append(m)
    for reasons, models in sorted(groups.items(), key=lambda g: -sum(m.sites - m.fused for m in g[1])):
        names, sites = ", ".join(m.name for m in models), sum(m.sites - m.fused for m in models)
        yield f"| {names} | {sites} | {'; '.join(reasons) or 'in no graph as a whole'} |"


def _said(reason: str) -> str:
    name, _, text = reason.partition(": ")
    return name if text == "…" else text


def placed(text: str, name: str, lines: Iterator[str]) -> str:
    """The document with ``lines`` between the marks of ``name``."""
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = text.split(begin)
    return before + "\n".join([begin, "", *lines, "", end]) + rest.split(end)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of the harness, one for each row of the first table")
    found = [series(path) for path in parser.parse_args().files]
    text = placed(placed(DOCUMENT.read_text(), "totals", totals(found)), "left", left(found[0]))
    DOCUMENT.write_text(text)
    keep("coverage", machine.facts(), [asdict(s) for s in found])
    print("\n".join(totals(found)))
    return int(any(m.wrong for s in found for m in s.models))


if __name__ == "__main__":
    raise SystemExit(main())
