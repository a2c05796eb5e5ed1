"""Reports: what explain() does to a model (nothing), and what people and programs read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse
from fuse import passes
from fuse.report.listing import listings
from fuse.report.paths import merge_paths
from fuse.report.reasons import RandomNumbers
from fuse.report.report import Report, skipped
from fuse.report.site import Reading, Site


def fused(layer: int, **more: Any) -> Site:
    return Site(True, None, "modeling_gpt2.py:91", f"h.{layer}.attn", "score * 0.125", "k <= q", **{"target": "cpp", **more})


DECLINED = Site(False, RandomNumbers("randn"), "model.py:7", "decoder <b>")


@pytest.fixture
def one_site_per_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "run", lambda *_: Reading((fused(0),)))


class Counting(nn.Module):
    """A buffer that a run would change, and a break between two graphs."""

    def __init__(self, after: Callable[[Tensor], object] = lambda x: None) -> None:
        super().__init__()
        self.after = after
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x)
        torch._dynamo.graph_break()
        self.after(y)
        return y.softmax(-1)


def test_explain_reads_every_graph_and_runs_none(one_site_per_graph: None) -> None:
    model = Counting()
    report = fuse.explain(model, torch.randn(2, 4))
    assert report.fused == 2 and not report.note
    assert model.get_buffer("calls").item() == 0
    assert fuse.report().sites == ()  # explained is not compiled


def test_explain_can_be_repeated_and_leaves_compiled_models_alone(one_site_per_graph: None) -> None:
    model, x = Counting(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="fuse", options={"inner": "eager"})
    expected = compiled(x)
    for _ in range(12):  # more often than Dynamo recompiles one function
        assert fuse.explain(compiled, x).fused == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), expected)


def test_explain_says_where_it_could_not_go_on(one_site_per_graph: None) -> None:
    def needs_data(y: Tensor) -> None:
        if not y.any():
            raise ValueError("all zeros")

    report = fuse.explain(Counting(torch._dynamo.disable(needs_data)), torch.randn(2, 4))
    assert report.fused == 1 and "all zeros" in report.note


def test_a_call_that_is_wrong_itself_raises_as_the_model_does() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fuse.explain(nn.Linear(4, 4))


def test_results_of_an_unfinished_model_have_their_shapes_and_gradients(one_site_per_graph: None) -> None:
    seen: list[Tensor] = []
    fuse.explain(Counting(torch._dynamo.disable(seen.append)), torch.randn(2, 4))
    assert seen[0].shape == (2, 4) and seen[0].requires_grad and not seen[0].any()


def test_layers_of_one_model_share_a_line() -> None:
    text = str(Report((*(fused(i) for i in range(12)), DECLINED)))
    assert text.splitlines()[0] == "13 attention sites, 12 fused"
    assert "12  yes    modeling_gpt2.py:91  k <= q  h.{0..11}.attn" in text
    assert "score       score * 0.125" in text


def test_one_site_at_several_lengths_is_one_line() -> None:
    run = torch.compile(lambda x: (x @ x.mT).softmax(-1) @ x, backend="fuse", options={"inner": "eager", "target": "reference"})
    for n in (8, 16, 24):
        run(torch.randn(2, n, 16))
    shown = str(fuse.report())
    assert shown.startswith("2 attention sites") and shown.count("test_report.py") == 1 and "\n      2  no " in shown


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT + self.bias).softmax(-1) @ x


SOME_BIAS = torch.randn(24, 24)


class Holder:
    """What holds tensors and modules, and is none."""

    def __init__(self) -> None:
        self.module, self.modules, self.offset = Biased(), [Biased(), Biased()], torch.randn(24, 24)

    def __call__(self, x: Tensor) -> Tensor:
        return self.modules[1](self.module((x @ x.mT + self.offset).softmax(-1) @ x))


def of_globals(x: Tensor) -> Tensor:
    return (x @ x.mT + SOME_BIAS).softmax(-1) @ x


def in_closures() -> Callable[[Tensor], Tensor]:
    module, offset = Biased(), torch.randn(24, 24)
    return lambda x: module((x @ x.mT + offset).softmax(-1) @ x)


CLOSED = in_closures()


@pytest.mark.parametrize(
    ("program", "formulas", "modules"),
    [
        (Holder(), [f"score + {x}[q, k]" for x in ("offset", "module.bias", "modules.bias")], ["", "module", "modules.1"]),
        (of_globals, ["score + SOME_BIAS[q, k]"], [""]),
        (in_closures(), ["score + offset[q, k]", "score + module.bias[q, k]"], ["", "module"]),
        (lambda x: CLOSED(x), ["score + CLOSED[q, k]", "score + CLOSED.bias[q, k]"], ["", "CLOSED"]),
        (lambda x, y=SOME_BIAS: (x @ x.mT + y.view(24, 24).flip(0).cumsum(0)).softmax(-1) @ x, ["score + cumsum[q, k]"], [""]),
    ],
    ids=["held", "global", "closure", "closure of a global", "made"],
)  # fmt: skip
def test_names_are_those_of_the_program(program: Callable[..., Any], formulas: list[str], modules: list[str]) -> None:
    sites = fuse.explain(program, torch.randn(2, 24, 32)).sites
    assert ([site.formula for site in sites], [site.module for site in sites]) == (formulas, modules)


def test_a_module_of_torch_that_is_compiled_itself_is_known_by_its_class() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    sites = fuse.explain(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 24, 32)).sites
    assert [(site.where, site.module) for site in sites] == [("MultiheadAttention", f"layers.{i}.self_attn") for i in (0, 1)]


def test_what_else_uses_the_probabilities_is_named_as_it_is_written() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        s = x @ x.mT
        return s.softmax(-1) @ x, s.view(2, -1).sum()

    (site,) = fuse.explain(program, torch.randn(2, 24, 32)).sites
    assert re.fullmatch(r"the scores, or what is made of them, are also used by view \(test_report\.py:\d+\)", str(site.reason))


def test_what_is_given_beside_a_result_is_told_and_its_kernel_shown() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        s = x @ x.mT
        p = s.softmax(-1)
        return p @ x, p, p.mean(1), s.logsumexp(-1)

    report = fuse.explain(program, torch.randn(2, 3, 24, 32))
    (site,) = report.sites
    assert set(site.beside) == {"the weights", "the mean of the weights over 3 heads", "the log-sum-exp of its rows"}
    assert "beside      the log-sum-exp of its rows and " in str(report)
    assert {listing.what for listing in listings(site)} == {"result", "weights"}


def test_a_declined_site_says_why_and_what_would_help() -> None:
    text = str(Report((DECLINED,)))
    assert "1  no     model.py:7  -     decoder" in text
    assert "RandomNumbers: random numbers are drawn in a way that cannot be drawn again in the backward pass: randn" in text
    assert "use dropout" in text


def test_an_empty_report_is_one_line() -> None:
    assert str(Report(())) == "0 attention sites, 0 fused"


@pytest.mark.parametrize(
    ("paths", "merged"),
    [
        (["h.0.attn"], "h.0.attn"),
        (["h.0.attn", "h.1.attn", "h.2.attn", "h.5.attn"], "h.{0..2,5}.attn"),
        (["enc.0.a", "enc.1.a", "dec.0.a"], "enc.{0..1}.a, dec.0.a"),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.1.b.1"], "s.{0..1}.b.{0..1}"),
        (["s.0.b.0", "s.1.b.0", "s.1.b.1"], "s.0.b.0, s.1.b.{0..1}"),
        ([""], ""),
    ],
)
def test_module_paths_are_merged_without_inventing_any(paths: list[str], merged: str) -> None:
    assert merge_paths(paths) == merged


def test_json_is_for_programs() -> None:
    data = json.loads(Report((fused(3, kernels={"cpp": Path("/k.cpp")}), DECLINED)).to_json())
    first, second = data["sites"]
    assert (first["fused"], first["mask"], first["kernels"]) == (True, "k <= q", {"cpp": "/k.cpp"})
    assert second["reason"]["name"] == "RandomNumbers" and "dropout" in second["reason"]["unblock"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(q.shape[-2])
    scores = torch.where(positions[None, :] <= positions[:, None], q @ k.mT * 0.25, -1e9)
    return scores.softmax(-1) @ v  # this line is the site


def test_a_site_without_a_softmax_says_what_is_in_its_place() -> None:
    def by_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).sigmoid()
        return s @ v / s.sum(-1, keepdim=True)

    x = [torch.randn(2, 96, 16) for _ in range(3)]
    report = fuse.explain(by_sum, *x)
    assert "softmax     none: scores are divided by their sum" in str(report)
    assert "softmax     none: scores multiply the values" in str(fuse.explain(lambda q, k, v: (q @ k.mT).sigmoid() @ v, *x))
    (site,) = report.sites
    assert site.spec is not None and "prob = sigmoid(score) / sum over k of sigmoid(score)" in str(site.spec)


def test_a_site_names_the_line_the_formula_and_the_mask_of_the_user() -> None:
    x = torch.randn(2, 64, 16)
    with torch.no_grad():
        (site,) = fuse.explain(attention, x, x, x).sites
    lines = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.endswith("# this line is the site"))
    assert site.fused and site.where == f"test_report.py:{line}"
    assert site.mask == "k <= q" and "score * 0.25" in site.formula
    assert site.kernels == {}  # explained, not built


def packed(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    seen = (i <= i[:, None]) & (i[:, None] - i < 1024) & (document[:, None] == document)
    return (q @ k.mT).masked_fill(~seen, -1e9).softmax(-1) @ v


def test_a_report_gives_the_predicate_in_the_user_s_terms_and_the_share_of_tiles_skipped(tmp_path: Path) -> None:
    x = torch.randn(1, 2048, 16)
    with torch.no_grad():
        causal = fuse.explain(attention, x, x, x)
        documents = fuse.explain(packed, x, x, x, torch.arange(2048) // 512)
    assert documents.sites[0].mask == "k <= q and q - k < 1024 and document[q] == document[k]"
    share = skipped(causal.sites[0])
    assert share is not None and 0.4 < share.skipped < 0.5 and share.exact
    assert f"skipped     {100 * share.skipped:.0f} % of the tiles (2048 queries, 2048 keys)" in str(causal)
    assert json.loads(causal.to_json())["sites"][0]["skipped"] == {"share": share.skipped, "exact": True}
    assert f"{100 * share.skipped:.0f} % of the tiles" in causal.to_html(tmp_path / "report.html").read_text()
    assert "of the tiles, more depends on the data" in str(documents)


def test_a_site_that_is_declined_is_in_the_report_with_its_reason() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        s = x @ x.mT
        return s.softmax(-1) @ x, s

    (site,) = fuse.explain(program, torch.randn(2, 64, 16)).sites
    assert not site.fused and site.reason is not None and site.reason.name == "ProbabilitiesUsed"
