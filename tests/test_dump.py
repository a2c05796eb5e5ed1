"""FUSE_DUMP through torch.compile: what is read there is what runs, and an edit is checked first. tests/test_alone.py runs such
files by themselves.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fuse
from fuse import targets
from fuse.qualify import judge
from fuse.targets import dump_index

pytestmark = pytest.mark.compiler


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        i = torch.arange(x.shape[-2])
        return (q @ k.mT * 0.25).masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ v


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Causal() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.h:
            x = layer(x)
        return (x @ x.mT).masked_fill(mask, -torch.inf).softmax(-1) @ x


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSE_DUMP", str(tmp_path / "dump"))
    targets.reset()
    return tmp_path / "dump"


def compiled(model: Callable[..., Tensor], *args: Tensor, qualify: str = "never") -> Tensor:
    """As a new process would."""
    targets.reset()
    torch.compiler.reset()
    found: Tensor = torch.compile(model, backend="fuse", options={"inner": "eager", "qualify": qualify})(*args)
    return found


@pytest.fixture
def run(dump: Path) -> Callable[..., Path]:
    """Compiles and checks an attention; returns the one file that was dumped."""

    def body(qualify: str = "once") -> Path:
        x = torch.randn(2, 64, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(attention, x, x, x, qualify=qualify), attention(x, x, x))
        (file,) = dump.glob("*.cpp")
        return file

    return body


# ------------------------------------------------------------------------------------------------------------ the folder


def test_a_dumped_kernel_is_the_one_that_runs(run: Callable[..., Path]) -> None:
    file = run()
    (site,) = fuse.report().sites
    assert site.kernels["cpp"].read_text() == file.read_text()
    assert "score * 0.25" in file.read_text()


def test_files_are_named_after_what_they_compute_and_listed_with_their_sites(dump: Path) -> None:
    x, mask = torch.randn(2, 64, 16).requires_grad_(), torch.rand(2, 64, 64) < 0.25
    compiled(Layers(), x, mask).sum().backward()
    names = sorted(file.name for file in dump.glob("*.cpp"))
    kinds = {re.sub(r"_float32_16x16_\w+-[0-9a-f]{12}\.cpp", "", name) for name in names}
    assert kinds == {"causal", "causal_backward", "masked", "masked_backward"} and len(names) == 4
    index = (dump / dump_index.INDEX).read_text()
    sections = dict(section.split("\n", 1) for section in index.split("## ")[1:])
    assert [f"[{name}]({name})" for name in names] == list(sections)
    causal = next(text for title, text in sections.items() if title.startswith("[causal_float32"))
    assert "    softmax over k of where(k > q, -inf, score * 0.25)\n    visible where k <= q\n" in causal
    place = re.search(r"- (test_dump\.py:\d+) .*h\.0 and 1 more: B0 = 2, q_len = 64, kv_len = 64\n", causal)
    assert place is not None and place[1] == fuse.report().sites[0].where
    masked = next(text for title, text in sections.items() if title.startswith("[masked_float32"))
    assert re.search(r"\n`operand\d` is `mask`", masked)
    backward = next(text for title, text in sections.items() if title.startswith("[masked_backward"))
    assert backward.lstrip().startswith("gradients of ") and "- test_dump.py:" in backward


def test_a_folder_tells_sizes_and_strides_of_every_call(dump: Path) -> None:
    x = torch.randn(2, 64, 4, 16).transpose(1, 2)
    compiled(attention, x, x, x)
    compiled(attention, *(torch.randn(2, 4, 30, 16) for _ in range(3)))
    (header,) = [dump_index.header_of(file.read_text()) for file in dump.glob("*.cpp")][:1]
    found = dump_index.calls(dump)
    assert all(call.is_of(header) or call.spec != header.spec for call in found)
    shapes = [(call.sizes, [(o.shape, o.strides) for o in call.operands][0]) for call in found]
    assert ((2, 4, 64, 64), ((2, 4, 64, 16), (4096, 16, 64, 1))) in shapes
    assert ((2, 4, 30, 30), ((2, 4, 30, 16), (1920, 480, 16, 1))) in shapes


def test_a_map_of_tiles_is_listed_with_the_sites_of_its_mask(dump: Path) -> None:
    mask = torch.rand(1, 1, 300, 300) < 0.25
    compiled(lambda x: (x @ x.mT).masked_fill(mask, -torch.inf).softmax(-1) @ x, torch.randn(1, 2, 300, 16))
    sections = (dump / dump_index.INDEX).read_text().split("## [")
    (of_map,) = [section for section in sections if section.startswith("tile_map")]
    assert "which tiles hold an entry where" in of_map and "- test_dump.py:" in of_map and "q_len = 300" in of_map


@pytest.mark.parametrize("damage", ["", "{", "null", '[{"spec": 1}]'])
def test_a_list_that_is_broken_is_begun_anew(run: Callable[..., Path], dump: Path, damage: str) -> None:
    run()
    (dump / dump_index.SITES).write_text(damage)
    run()
    assert len(json.loads((dump / dump_index.SITES).read_text())) == 1


def test_a_list_that_cannot_be_written_costs_a_line(
    run: Callable[..., Path], dump: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    (dump / dump_index.SITES).unlink()
    monkeypatch.setattr(dump_index, "write_atomically", refuse)
    run()
    assert f"{dump / dump_index.INDEX} is not written: no space left" in caplog.text


def refuse(*_: object) -> None:
    raise OSError("no space left")


# ----------------------------------------------------------------------------------------------------------------- edits


def comment(file: Path) -> None:
    """An edit that changes nothing."""
    file.write_text(file.read_text().replace("#define FUSE_WIDTH", "// mine\n#define FUSE_WIDTH"))


def double(file: Path) -> None:
    text = file.read_text()
    assert text.count("out_scale / l[v];") == 1
    file.write_text(text.replace("out_scale / l[v];", "R(2) * out_scale / l[v];"))


def test_an_edited_kernel_is_used_in_its_place_and_announced_once(
    run: Callable[..., Path], dump: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = run()
    comment(file)
    edited = file.read_text()
    assert not caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == file
    assert caplog.text.count(f"fuse takes the edited kernel {file} in place of the one that it rendered") == 1
    (_, site) = fuse.report().sites
    assert site.kernels["cpp"] == file and file.read_text() == edited
    assert f"edited kernel {file}" in str(fuse.report())
    assert f"## [{file.name}]({file.name}), edited\n" in (dump / dump_index.INDEX).read_text()


def test_a_wrong_edit_is_refused_with_its_error_and_where_and_the_site_runs_as_it_did(run: Callable[..., Path]) -> None:
    file = run()
    double(file)
    with pytest.warns(RuntimeWarning) as told:
        run()
    (said,) = [str(w.message) for w in told if w.category is RuntimeWarning]
    finding = r"error \d\.\de[+-]\d\d of the result where eager has \d\.\de-\d\d, at \[\d+, \d+, \d+\]"
    edit = f"the edited kernel {re.escape(str(file))}"
    assert re.match(rf"fuse does not use {edit}: {finding}\. Correct the file, or delete it", said), said
    site = fuse.report().sites[-1]
    assert not site.recovered and site.reason is not None and site.reason.name == "EditRefused"
    assert re.search(f"{edit}: {finding}", str(site.reason))
    file.unlink()
    run()
    assert fuse.report().sites[-1].fused


def test_a_wrong_edit_of_gradients_is_refused(dump: Path) -> None:
    x = torch.randn(2, 64, 16).requires_grad_()
    compiled(attention, x, x, x, qualify="once").sum().backward()
    (file,) = dump.glob("attention_backward*.cpp")
    text = file.read_text()
    edited = text.replace("const VR d_score = prob *", "const VR d_score = R(2) * prob *")
    assert edited != text
    file.write_text(edited)
    with pytest.warns(RuntimeWarning, match=r"edited kernel .*attention_backward.*of the gradient of operand"):
        compiled(attention, x, x, x, qualify="once")


def test_who_asks_for_no_check_gets_the_edit_and_a_warning(run: Callable[..., Path]) -> None:
    file = run("never")
    double(file)
    x = torch.randn(2, 64, 16)
    with pytest.warns(RuntimeWarning, match=rf"the edited kernel {re.escape(str(file))} runs unchecked: qualify='never'"):
        torch.testing.assert_close(compiled(attention, x, x, x), 2 * attention(x, x, x))


def test_what_was_decided_of_a_kernel_says_nothing_of_its_edit(
    run: Callable[..., Path], dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it that it was right, or slower than SDPA."""
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.randn(2, 64, 16)
    monkeypatch.delenv("FUSE_DUMP")
    compiled(attention, x, x, x, qualify="once")
    assert list((tmp_path / "cache").rglob("verdict-*.json"))
    monkeypatch.setenv("FUSE_DUMP", str(dump))
    double(run())
    with pytest.warns(RuntimeWarning, match="does not use the edited kernel"):
        compiled(attention, x, x, x, qualify="once")


def test_an_edited_kernel_is_not_timed(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    comment(run())
    monkeypatch.setattr(judge, "_timed", lambda *_: pytest.fail("timed"))
    run()


def test_a_broken_edit_is_told_and_the_model_still_runs(run: Callable[..., Path]) -> None:
    run().write_text("#error half finished\n")
    with pytest.warns(RuntimeWarning, match="half finished"):
        run()
