"""The page of a report as a browser runs it: pictures, search, filters, keys, links into kernels, narrow screens."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_page import Model

import fuse
from fuse.report.page import page_of, rendered
from fuse.report.report import Report

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="runs the page in Chromium, which is not installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--virtual-time-budget=5000",
    "--window-size=1200,900",
)  # fmt: skip
# What follows the page's own script: it does something as a reader would, and writes what it found.
TOOLS = """
const press = (key, target = document.body) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const type = text => { const s = document.querySelector("#search"); s.value = text; s.dispatchEvent(new Event("input")); };
const shown = () => [...document.querySelectorAll(".group")].filter(g => !g.hidden).map(g => g.id);
const errors = [];
addEventListener("error", event => errors.push(event.message));
const write = found => document.body.append(Object.assign(document.createElement("pre"),
  {id: "found", textContent: JSON.stringify({...found, errors})}));
"""


@pytest.fixture(scope="module")
def report() -> Report:
    return fuse.explain(Model(), torch.randn(2, 200, 32), padding=torch.ones(2, 200, dtype=torch.bool))


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return rendered(page_of(report))


def run(page: str, script: str, folder: Path) -> dict[str, Any]:
    """What ``script`` gives to ``write``."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{TOOLS}\n(async () => {{ {script} }})();</script></body>"))
    return seen(file, folder)


def seen(file: Path, folder: Path) -> dict[str, Any]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    written = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert written is not None, dom[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(written[1]))
    assert found.pop("errors") == []
    return found


def test_search_filters_and_keys(page: str, tmp_path: Path) -> None:
    found = run(
        page,
        """
        const found = {all: shown()};
        type("layers.1"); found.module = shown();
        type("PROBABILITIESUSED"); found.reason = shown(); found.told = document.querySelector(".found").textContent;
        type("no such word"); found.none = shown(); found.nothing = document.querySelector(".nothing").hidden;
        press("Escape"); found.cleared = shown();
        document.querySelector("[data-filter=left]").click(); found.left = shown();
        press("f"); found.afterLast = shown();
        press("j"); found.first = document.activeElement.id;
        press("j"); press("j"); press("j"); found.last = document.activeElement.id;
        press("k"); found.before = document.activeElement.id;
        press("o"); found.open = document.querySelectorAll("#g2 details.kernel[open], #g2 details.passes[open]").length;
        press("o"); found.closed = document.querySelectorAll("#g2 details.kernel[open], #g2 details.passes[open]").length;
        press("/"); found.searching = document.activeElement.id;
        press("j", document.querySelector("#search")); found.typed = document.activeElement.id;
        document.activeElement.blur();
        press("?"); found.help = document.querySelector("#keys").open; document.querySelector("#keys").close();
        press("t"); found.theme = document.documentElement.dataset.theme;
        press("t"); found.again = document.documentElement.dataset.theme;
        write(found);
        """,
        tmp_path,
    )
    everything = ["g1", "g2", "g3"]
    assert found.pop("theme") != found.pop("again")
    assert found == {
        "all": everything, "module": ["g2"], "reason": ["g3"], "told": "1 of 3 groups", "none": [], "nothing": False,
        "cleared": everything, "left": ["g3"], "afterLast": everything, "first": "g1", "last": "g3", "before": "g2", "open": 3,
        "closed": 0, "searching": "search", "typed": "search", "help": True,
    }  # fmt: skip


def test_a_page_without_sites_raises_nothing(tmp_path: Path) -> None:
    found = run(
        rendered(page_of(Report((), graphs=1))),
        """for (const key of ["j", "k", "o", "f", "t", "Escape"]) press(key); type("x"); write({shown: shown()});""",
        tmp_path,
    )
    assert found == {"shown": []}


def causal(q: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[-2])
    return (q @ q.mT).masked_fill(i > i[:, None], -1e9).softmax(-1) @ q


def test_a_picture_shows_each_tile_in_its_colour_at_the_sizes_that_are_asked_for(tmp_path: Path) -> None:
    text = rendered(page_of(fuse.explain(causal, torch.randn(1, 96, 16)), kernels=False))
    found = run(
        text,
        """
        const set = (name, value) => {
          const input = document.querySelector(`.sizes [name="${name}"]`);
          input.value = value; input.dispatchEvent(new Event("change"));
        };
        set("queries", 90); set("keys", 120); set("tile queries", 30); set("tile keys", 40);
        const canvas = document.querySelector("canvas"), context = canvas.getContext("2d"), found = {tiles: []};
        const colour = name => { context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
          return context.fillStyle; };
        const known = Object.fromEntries(["empty", "partial", "full"].map(name => [colour(name), name]));
        const hex = data => "#" + [...data.slice(0, 3)].map(x => x.toString(16).padStart(2, "0")).join("");
        for (let r = 0; r < 3; r++) for (let c = 0; c < 3; c++) {
          const x = (c + .5) / 3 * canvas.width, y = (r + .5) / 3 * canvas.height;
          found.tiles.push(known[hex(context.getImageData(x, y, 1, 1).data)]);
        }
        found.label = canvas.getAttribute("aria-label");
        found.counts = [...document.querySelectorAll(".legend output")].map(o => o.value);
        canvas.focus(); press("ArrowRight", canvas); press("ArrowRight", canvas); press("ArrowDown", canvas);
        found.told = document.querySelector(".told").textContent;
        set("tile queries", 1); set("tile keys", 1); set("queries", 8192); set("keys", 8192);
        found.many = document.querySelector(".told").textContent;
        write(found);
        """,
        tmp_path,
    )
    empty, partial, full = "empty", "partial", "full"
    assert found["tiles"] == [partial, empty, empty, partial, partial, empty, full, partial, partial]
    assert found["label"] == "3 by 3 tiles of queries by keys: 3 empty, 5 partial, 1 full"
    assert found["counts"] == ["3 (33.3 %)", "5 (55.6 %)", "1 (11.1 %)"]
    assert found["told"] == "queries 30 to 59, keys 40 to 79: partial"
    assert found["many"] == "Too many tiles to draw: choose larger ones."


def test_a_formula_leads_to_the_lines_of_a_kernel(report: Report, page: str, tmp_path: Path) -> None:
    found = run(
        page,
        """
        const link = [...document.querySelectorAll("#g1 .links a")].find(a => a.textContent === "score_full"), found = {};
        link.click();
        await new Promise(done => setTimeout(done, 200));
        const line = document.querySelector(".line.target");
        Object.assign(found, {line: line.textContent, open: line.closest("details").open, kinds: []});
        found.kinds = ["c", "k", "d"].filter(kind => document.querySelector(`#g1k1 .long .${kind}`));
        found.text = [...document.querySelectorAll("#g1k1 .long .line")].map(l => l.textContent.slice(
          l.querySelector(".number").textContent.length)).join("");
        write(found);
        """,
        tmp_path,
    )
    assert found["open"] and "void score_full(" in found["line"] and found["kinds"] == ["c", "k", "d"]
    listing = page_of(report).groups[0].listings[0]
    assert found["text"].rstrip() == listing.text.rstrip()  # colours change no character


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_nothing_is_wider_than_the_screen(page: str, width: int, tmp_path: Path) -> None:
    (tmp_path / "inside.html").write_text(page)
    outside = tmp_path / "outside.html"
    outside.write_text(
        f"""<!doctype html><iframe src="inside.html" style="width:{width}px;height:900px;border:0"></iframe>
        <script>{TOOLS}
        document.querySelector("iframe").onload = event => {{
          const inside = event.target.contentDocument;
          inside.querySelectorAll("details").forEach(d => {{ d.open = true; }});
          const cut = [...inside.querySelectorAll(".pair:not(.wide) .lines")].filter(x => x.scrollWidth > x.clientWidth).length;
          write({{width: inside.documentElement.scrollWidth, narrow: inside.documentElement.clientWidth, cut}});
        }};</script>"""
    )
    found = seen(outside, tmp_path)
    assert found["width"] <= found["narrow"] <= width and found["cut"] == 0
