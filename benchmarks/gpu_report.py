"""The results of gpu.py as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpu_attention import PEERS

BACKWARD = 2.5  # operations of backward, in those of forward: five products instead of two


def table(found: dict[str, Any]) -> str:
    """Markdown; what is missing in ``found`` is left out."""
    rate = found.get("products", {}).get("rate")
    parts = [_facts(found), _correctness(found.get("correctness"))]
    for direction, factor in (("forward", 1.0), ("backward", BACKWARD)):
        cases = [c for c in found.get("attention", []) if c.get(direction) and c["kind"] != "decode"]
        parts.append(_attention(direction, factor, cases, rate))
    parts.append(_decode([c for c in found.get("attention", []) if c.get("forward") and c["kind"] == "decode"]))
    parts.append(_models(found.get("models", [])))
    parts.append(_failures([*found.get("attention", []), *found.get("models", [])]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(found: dict[str, Any]) -> str:
    device, products = found.get("device", {}), found.get("products", {})
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    clock, rate = device.get("clocks.max.sm", "unknown"), products.get("rate")
    lines = [f"{device.get('device')}, {found.get('time')}, {versions}.", f"Clock of the processors at most {clock}."]
    if rate:
        size = products["size"]
        lines.append(f"Products of {size} x {size} {products['dtype']} matrices: {rate / 1e12:.3g} TFLOP/s.")
    return "\n".join(lines)


def _correctness(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    failed = "".join(f"\n- {f['name']}: {f['error']}" for f in found["failed"])
    right = found["checked"] - len(found["failed"])
    return f"Against float64: {right} of {found['checked']} are right, {found['not checked']} were not checked.{failed}"


def _attention(direction: str, factor: float, cases: Sequence[dict[str, Any]], rate: float | None) -> str:
    ways = ("fuse", *PEERS)
    rows = []
    for c in cases:
        rates = {name: factor * c["operations"] / seconds for name, seconds in c[direction].items()}
        share = f"{100 * rates['fuse'] / rate:.0f} %" if rate and "fuse" in rates else ""
        rows.append([c["case"], *(f"{rates[w] / 1e12:.3g}" if w in rates else "" for w in ways), share])
    return _rows(f"Attention {direction}, TFLOP/s", ["case", *ways, "fuse / products"], rows)


def _decode(cases: Sequence[dict[str, Any]]) -> str:
    ways = ("fuse", *PEERS)
    rows = [
        [c["case"], *(f"{c['forward'][w] * 1e6:.0f}" if w in c["forward"] else "" for w in ways),
         f"{c['bytes'] / c['forward']['fuse'] / 1e9:.0f} GB/s" if "fuse" in c["forward"] else ""]
        for c in cases
    ]  # fmt: skip
    return _rows("One query, microseconds", ["case", *ways, "fuse reads"], rows)


def _models(cases: Sequence[dict[str, Any]]) -> str:
    ways = list(dict.fromkeys(way for c in cases for way in c.get("seconds", {})))
    rows = [
        [c["case"], *(f"{c['batch'] * c['length'] / c['seconds'][w]:.0f}" if w in c["seconds"] else "" for w in ways)]
        for c in cases if c.get("seconds")
    ]  # fmt: skip
    return _rows("Models, tokens per second (attention as written in the model, compiler)", ["model", *ways], rows)


def _failures(cases: Iterable[dict[str, Any]]) -> str:
    lines = [f"- {c['case']}: {c['error']}" for c in cases if c["error"]]
    lines += [f"- {c['case']}, {way}: {why}" for c in cases for way, why in c.get("missing", {}).items()]
    return "Not measured:\n" + "\n".join(lines) if lines else ""


def _rows(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
