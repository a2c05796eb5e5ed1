"""The page of a report: what stands in it, for whom it is safe, and that it needs nothing else."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from problems import B0, K, Q, load, op
from specs import CASES
from torch import Tensor, nn

import fuse
from fuse.qualify import faster
from fuse.report import formula
from fuse.report.excerpt import excerpt, short_path
from fuse.report.listing import contents
from fuse.report.page import Group, page_of, rendered
from fuse.report.reasons import InternalError
from fuse.report.report import Report
from fuse.report.sentence import sentences
from fuse.report.site import Frame, Site
from fuse.report.subject import Subject
from fuse.targets import sources

ROOT = Path(__file__).parents[1]
VOID = {"meta", "input", "br", "img", "link", "hr", "mspace"}


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(32, 96), bias

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        i = torch.arange(n)
        seen = (i <= i[:, None]) & padding[:, None, None]
        score = q @ k.mT / 4 + (i - i[:, None]) * 0.5 if self.bias else q @ k.mT / 4
        y = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v  # this line is the site
        return x + y.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers of one kind, one of another, and one whose scores are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(False), Layer(True), Layer(False)])

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x, padding)
        s = x @ x.mT
        return s.softmax(-1) @ x, s


@pytest.fixture(scope="module")
def report() -> Report:
    x = torch.randn(2, 200, 32)
    return fuse.explain(Model(), x, padding=torch.ones(2, 200, dtype=torch.bool))


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return rendered(page_of(report))


class Elements(HTMLParser):
    """Fails where elements are not closed in order; keeps attributes, and the text by the innermost element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))


def groups(report: Report) -> Sequence[Group]:
    return page_of(report, kernels=False).groups


# -------------------------------------------------------------------------------------------------------------- groups


def test_sites_that_compute_the_same_are_one_group(report: Report) -> None:
    found = [(g.count, g.status, g.title) for g in groups(report)]
    assert found == [(2, "fused", "layers.{0,2}"), (1, "fused", "layers.1"), (1, "left", report.sites[-1].where)]


def test_kernels_that_are_not_built_are_shown_as_they_would_be(report: Report) -> None:
    group = page_of(report).groups[0]
    assert [listing.what for listing in group.listings] == ["result", "gradients"]  # its parameters want gradients
    for listing in group.listings:
        assert listing.about == "as it would be built on this machine" and "visible where" in listing.text
    assert [listing.what for listing in page_of(report).groups[-1].listings] == []


@pytest.mark.compiler
def test_kernels_that_are_built_are_shown_as_they_lie_on_disk_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster, "times", lambda *_: faster.Times(1e-3, 2.5e-3, faster.PLAIN))
    fuse.reset()
    q, k, v = (torch.randn(1, 8, 256, 64) for _ in "qkv")
    torch.compile(causal, backend="fuse", options={"inner": "eager", "qualify": "always"})(q, k, v)
    (site,) = fuse.report().sites
    (group,) = page_of(fuse.report()).groups
    assert site.spec is not None, f"left to what torch has: {site.reason}"
    (listing,) = group.listings
    file = site.runs["forward"].file
    assert file is not None and listing.text == file.read_text() and listing.about == f"kernel {file.name}"
    assert listing.text == sources(site.spec, "cpp", site.wanted)["forward"]
    assert dict(group.facts)["measured"] == "plain operations: 2.5 ms, fuse 1 ms"


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return (q @ k.mT * 0.125).masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_a_target_shows_every_kernel_of_a_spec(target: str) -> None:
    if target == "triton":
        pytest.importorskip("triton")
    spec = CASES["mapped_bool"]("float32").spec
    found = sources(spec, target, (True, True, True, False, False))
    assert list(found) == ["forward", "backward", "tile map"]
    assert all(list(contents(text)) for text in found.values())
    assert list(sources(spec, target, (False,) * 5)) == ["forward", "tile map"]
    assert sources(spec, "reference", (True, True, True, False, False)) == {}


def test_names_of_tensors_and_places_do_not_part_a_group_but_are_told() -> None:
    spec = CASES["causal"]("float32").spec
    site = Site(True, None, "a.py:1", "layers.0", "score", "k <= q", spec, (2, 3, 37, 37), {0: "x"}, target="cpp")
    other = replace(site, where="b.py:2", module="decoder.0", names={0: "y"}, sizes=(2, 3, 64, 64))
    (group,) = groups(Report((site, other, replace(site, module="layers.1"))))
    assert [(p.count, p.where, p.modules) for p in group.places] == [(2, "a.py:1", "layers.{0..1}"), (1, "b.py:2", "decoder.0")]
    assert group.places[1].sizes == "batch 2 × 3, 64 queries, 64 keys"
    assert dict(group.facts)["sizes"] == "batch 2 × 3, 37 queries, 37 keys, 16 features (others below)"
    assert len(groups(Report((site, replace(site, spec=CASES["window"]("float32").spec, sizes=(1, 2, 300, 300, 50)))))) == 2


def test_a_group_says_sizes_dtype_memory_and_work(report: Report) -> None:
    facts = dict(groups(report)[0].facts)
    assert facts["sizes"] == "batch 2 × 2, 200 queries, 200 keys, 16 features"
    assert facts["dtype"] == "float32" and "more depends on the data" in facts["work skipped"]
    assert facts["memory saved"].startswith("625 KiB for each tensor of scores")  # 2 * 2 * 200 * 200 * 4 bytes


def test_a_site_that_is_left_says_why_and_what_would_change_that(report: Report) -> None:
    group = groups(report)[-1]
    assert group.reason is not None and group.reason[0] == "ProbabilitiesUsed" and "logsumexp" in group.reason[2]
    assert group.excerpts[0].lines and "@ x, s" in dict(group.excerpts[0].lines)[group.excerpts[0].line]


def test_every_pass_stands_in_order_with_what_it_changed(report: Report) -> None:
    steps = groups(report)[0].steps
    passes = ["lift", "know_contents", "recover_mask", "tabulate", "put_keys_innermost", "map_tiles", "insert"]
    assert [step.name for step in steps] == passes
    assert [line for mark, line in steps[2].lines if mark == "+"][0].startswith("visible where") and steps[2].changed
    assert not steps[4].changed


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_is_html_whose_elements_close(page: str) -> None:
    found = Elements(page)
    assert "Model" in "".join(text for tag, text in found.texts if tag == "title")
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    found = Elements(page)
    led = [value for _, name, value in found.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert led and all(value.startswith("#") for value in led)
    style = "".join(text for tag, text in found.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    script = "".join(text for tag, text in found.texts if tag == "script")
    assert not re.search(r"https?:|fetch\(|XMLHttp|WebSocket|import\(|eval\(|new Function|innerHTML", script)


def test_every_site_formula_line_and_mask_stands_in_the_page(report: Report, page: str) -> None:
    text = html.unescape(page)
    for group in groups(report):
        assert group.title in text and all(line.mathml in page and line.text in text for line in group.formula)
        assert all(condition in text and meaning in text for condition, meaning in group.mask)
    assert "this line is the site" in page and "Model, " in page and "padding bool [2, 200]" in page
    assert json.loads(re.search(r'id="pictures">(.*?)</script>', page, re.DOTALL)[1]).keys() == {"g1", "g2"}  # type: ignore[index]


def test_a_page_of_nothing_and_one_of_a_failure_are_pages_too() -> None:
    assert "looked for" in rendered(page_of(Report((), graphs=1))) and Elements(rendered(page_of(Report(()))))
    failed = Site(False, InternalError("KeyError: 'x'"), "", "")
    assert "at a place that is not known" in rendered(page_of(Report((failed,))))


def test_the_page_says_date_command_machine_and_versions(page: str) -> None:
    for name in ("made", "by", "on", "with"):
        assert f"<dt>{name}</dt>" in page
    assert f"torch {torch.__version__}" in page


def test_a_compiled_site_says_what_was_measured_and_which_kernel_runs(report: Report) -> None:
    site = replace(report.sites[0], measured="plain operations: 3 ms, fuse 1 ms")
    assert ("measured", "plain operations: 3 ms, fuse 1 ms") in groups(Report((site,)))[0].facts


@pytest.mark.parametrize("evil", ["</script><img src=x onerror=alert(1)>", "<img src=x onerror=alert(2)>", "{{ page }}<!--"])
def test_names_and_sources_of_users_are_text(evil: str, tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        f"import torch\nEVIL = {evil!r}\n"
        f"class Inner(torch.nn.Module):\n"
        f"    def forward(self, x): return (x @ x.mT).softmax(-1) @ x  # {evil}\n"
        f"class Outer(torch.nn.Module):\n"
        f"    def __init__(self):\n        super().__init__()\n        self.inner = Inner()\n"
        f"    def forward(self, x): return self.inner(x)\n"
    )
    spec = importlib.util.spec_from_file_location("model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = fuse.explain(module.Outer(), torch.randn(2, 24, 16))
    site = replace(found.sites[0], module=f"layers.{evil}", names={0: evil, 1: evil, 2: evil}, measured=evil)
    masked = replace(site, spec=CASES["documents"]("float32").spec, sizes=(2, 3, 100, 100), names=dict.fromkeys(range(4), evil))
    hostile = replace(found, sites=(site, masked), subject=Subject(evil, (evil,)), note=evil)
    page = hostile.to_html(tmp_path / "page.html").read_text()
    harmless = Elements(page)
    assert not any(name.startswith("on") for _, name, _ in harmless.attributes)
    assert all(f"<{tag}" not in page for tag in ("img", "!--"))
    assert html.escape(evil) in page or html.escape(evil, quote=False) in page


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("causal", "a = score * 0.25 where k <= q, else -inf"),
        ("causal_finite_fill", "else at most -3.40282e+38"),
        ("masked_rows_with_sink", "prob = softmax over k of a, with tensor3[b1] in the sum"),
    ],
)
def test_a_formula_is_told_in_plain_text_too(case: str, says: str) -> None:
    spec = CASES[case]("float32").spec
    found = formula.lines(spec, {3: "tensor3"})
    assert any(says in line.text for line in found)
    for line in found:
        Elements(line.mathml)


def test_tensors_say_what_reads_them() -> None:
    spec = CASES["mapped_bool"]("float32").spec
    roles = {t.element: t.role for t in formula.tensors(spec, {3: "allowed", 4: "cells"})}
    assert roles["allowed"] == "read by mask" and roles["cells"] == "read by choice of tiles"
    spec = CASES["masked_rows_with_sink"]("float32").spec
    assert formula.tensors(spec, {3: "sinks"})[3].role == "read by softmax"


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_spec_can_be_typeset(case: str) -> None:
    spec = CASES[case]("float32").spec
    names = {i: f"<t{i}>" for i in range(9)}
    for line in formula.lines(spec, names):
        Elements(line.mathml)
    assert [t.letter for t in formula.tensors(spec, names)][:3] == ["Q", "K", "V"]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("causal", [("k <= q", "causal: a query sees the keys up to its own place")]),
        ("causal_offset", [("k <= q + kv_len - q_len", "causal, counted from the end: the last query sees every key")]),
        ("documents", [("k <= q", "causal: a query sees the keys up to its own place"),
                       ("t3[q] == t3[k]", "keys that have the same t3 as the query")]),
        ("dilated", [("k <= q", "causal: a query sees the keys up to its own place"), ("(q - k) % 3 == 0", "")]),
    ],
)  # fmt: skip
def test_masks_that_people_know_are_told_in_words(case: str, says: list[tuple[str, str]]) -> None:
    mask = CASES[case]("float32").spec.mask
    assert mask is not None
    assert list(sentences(mask.predicate, {3: "t3"})) == says


def test_what_compares_two_tensors_is_not_told_as_one() -> None:
    ids = torch.zeros(2, 9, dtype=torch.int64)
    compared = op("eq", load(ids, 3, B0, Q), load(ids, 4, B0, K))
    assert list(sentences(compared, {3: "a", 4: "b"})) == [("a[q] == b[k]", "")]


@pytest.mark.parametrize("file", sorted((ROOT / "tests/expected").glob("gpt2_*")), ids=lambda file: file.name)
def test_the_outline_leads_to_where_things_are_defined(file: Path) -> None:
    lines = file.read_text().splitlines()
    found = list(contents(file.read_text()))
    outlined = lines[lines.index(next(x for x in lines if x.endswith("contents, in order"))) + 1 :]
    assert len(found) == next(i for i, line in enumerate(outlined) if not line.startswith(("//   ", "#   ")))
    for entry in found:
        assert entry.name in lines[entry.line - 1] and not lines[entry.line - 1].startswith(("//", "# "))
    assert {"result", "mask" if file.suffix == ".cpp" else "score"} <= {entry.part for entry in found}


def test_an_excerpt_has_neighbours_and_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.py"
    file.write_text("\n".join(f"    line{i}" for i in range(1, 31)))
    monkeypatch.chdir(tmp_path)
    found = excerpt(Frame(str(file), 20, "forward"), around=2)
    assert found.lines == tuple((i, f"line{i}") for i in range(18, 23)) and found.path == "model.py"
    assert excerpt(Frame(str(file), 99)).lines == () == excerpt(Frame("/nowhere.py", 1)).lines
    assert short_path("/home/u/.venv/lib/python3.11/site-packages/transformers/models/x.py") == "transformers/models/x.py"
    assert short_path("/elsewhere/model.py") == "model.py"


def test_a_subject_tells_model_and_call() -> None:
    args = torch.zeros(2, 4), [torch.zeros(1, dtype=torch.int64)]
    found = Subject.of(nn.Linear(4, 4), args, {"mask": torch.zeros(3).bool()})
    assert found.model == "Linear, 20 parameters"
    assert found.inputs == ("args[0] float32 [2, 4]", "args[1][0] int64 [1]", "mask bool [3]")
    assert Subject.of(partial(torch.add, 1), (), {}).model == "partial"
    assert Subject.of(nn.LazyLinear(4), (), {}).model == "LazyLinear"
    assert Subject.of(test_a_subject_tells_model_and_call, (), {}).model == "test_a_subject_tells_model_and_call"


# ----------------------------------------------------------------------------------------------------------- notebooks


def test_in_a_notebook_a_report_is_a_table_with_the_page_on_demand(report: Report) -> None:
    found = Elements(report._repr_html_())
    cells = [text for tag, text in found.texts if tag in ("td", "th")]
    assert cells[:7] == ["sites", "where", "mask", "2", "fused", "layers.{0,2}", "k <= q and padding[k]"]
    assert any("ProbabilitiesUsed" in cell for cell in cells)
    (inside,) = [value for tag, name, value in found.attributes if (tag, name) == ("iframe", "srcdoc")]
    assert Elements(inside).texts and "<canvas" in inside and 'class="kernel"' not in inside


def test_in_a_notebook_a_site_is_a_table_with_its_formula_and_its_line(report: Report) -> None:
    fused, *_, left = report.sites
    found = Elements(fused._repr_html_())
    assert "y = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v  # this line is the site" in [
        text for _, text in found.texts
    ]
    assert sum(1 for tag, _, _ in found.attributes if tag == "math") == 4
    assert "fuse gives these too" in left._repr_html_()


class Printer:
    """As IPython's."""

    def __init__(self) -> None:
        self.printed = ""

    def text(self, text: str) -> None:
        self.printed += text


def test_ipython_prints_a_report_as_text_and_a_site_line_by_line(report: Report) -> None:
    whole, one = Printer(), Printer()
    report._repr_pretty_(whole, False)
    report.sites[0]._repr_pretty_(one, False)
    assert whole.printed == str(report)
    assert "mask        k <= q and padding[k]\n" in one.printed and "\n            prob = softmax over k of a\n" in one.printed
