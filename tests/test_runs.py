"""What a report says of a site is what computes it: result, gradients, and the map of its mask's tiles."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from specs import CASES
from torch import Tensor

import fuse
from fuse import backend, targets
from fuse.report.site import Site
from fuse.targets.cache import BuildFailed
from fuse.targets.cpp import target

# Compiles, in little time, what the first letters of a source's name do not forbid.
COMPILER = """#!/bin/sh
for a in "$@"; do case "$a" in */{refused}*.cpp) echo "$a:1: error: refused" >&2; exit 1;; esac; done
exec {compiler} "$@" -O0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    targets.reset()
    yield tmp_path
    targets.reset()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).masked_fill(~mask, -1e9).softmax(-1) @ v


def heads(n: int = 64, grad: bool = False) -> list[Tensor]:
    return [x.requires_grad_(grad) for x in torch.randn(3, 1, 2, n, 16).unbind(0)]


def compiled(target: str = "cpp", program: Callable[..., Tensor] = attention) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(program, backend="fuse", options={"inner": "aot_eager", "target": target})


def ran(target: str = "cpp", train: bool = False) -> Site:
    """The site of a model that has run, and given what eager gives."""
    inputs = heads(grad=train)
    run = compiled(target)
    torch.testing.assert_close(run(*inputs), attention(*inputs), rtol=1e-4, atol=1e-5)
    if train:
        found, expected = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (run, attention))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return fuse.report().sites[-1]


def refuse(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Has the compiler fail for kernels whose name begins so."""
    from fuse.targets.cpp.compiler import cxx_compiler

    script = folder / "compiler"
    script.write_text(COMPILER.format(refused=name, compiler=" ".join(cxx_compiler())))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


# ------------------------------------------------------------------------------------------------------------- by whom


@pytest.mark.compiler
def test_a_kernel_is_told_with_its_file_for_result_and_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        site = ran(train=True)
    forward, backward = site.runs["forward"], site.runs["backward"]
    assert site.fused and (forward.by, backward.by) == ("kernel", "kernel")
    assert forward.file == site.kernels["cpp"] and forward.file.exists()
    assert backward.file is not None and backward.file.name.startswith("attention_backward")
    assert str(forward.file) in str(fuse.report()) and str(backward.file) in str(fuse.report())
    assert fuse.report().summary == "1 attention site, 1 fused"


def test_without_a_compiler_nothing_is_called_fused(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_compiler(folder, monkeypatch)
    with pytest.warns(RuntimeWarning, match="no C.. compiler was found"):
        site = ran()
    assert site.recovered and not site.fused and site.runs["forward"].by == "reference"
    report = fuse.report()
    assert (report.recovered, report.fused, report.summary) == (1, 0, "1 attention site, 0 fused, 1 by the reference")
    assert "  1  no  " in str(report) and "reference: no C++ compiler was found" in str(report)
    (data,) = json.loads(report.to_json())["sites"]
    assert data["fused"] is False and data["runs"]["forward"]["by"] == "reference"
    assert "apt install g++" in data["runs"]["forward"]["why"]
    page = report.to_html(tmp_path / "report.html").read_text()
    assert ">by the reference<" in page and "reference: no C++ compiler was found" in page and ">fused<" not in page


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (
            "CXX",
            "nowhere -O2",
            r"CXX='nowhere -O2': there is no program 'nowhere' that can be run. Unset it, or: Install g\+\+",
        ),
        ("CXX", 'g++ "', 'CXX=g\\+\\+ " is no command: No closing quotation. Correct or unset it'),
        ("CXX", "{folder}/garbage", "the C.. compiler did not run: .*Exec format error: '{folder}/garbage'. Install g"),
        ("CXX", "true", "/true -std.* made no library of .*cpp, and said that all went well. Set CXX to another"),
        ("FUSE_CACHE_DIR", "{folder}/garbage", "FUSE_CACHE_DIR='{folder}/garbage' is not valid; allowed: a folder"),
        (
            "FUSE_CACHE_DIR",
            "/proc/nowhere",
            "Kernels are kept in /proc/nowhere/cpp: make it writable, or set FUSE_CACHE_DIR to",
        ),
        ("FUSE_DUMP", "{folder}/garbage", "FUSE_DUMP='{folder}/garbage' is not valid; allowed: a folder"),
        ("FUSE_DUMP", "/proc/nowhere", "FUSE_DUMP='/proc/nowhere' cannot be written to: .*Set another folder, or unset it"),
    ],
)
def test_a_variable_that_is_wrong_is_named_with_its_value_and_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    (folder / "garbage").write_text("garbage")
    (folder / "garbage").chmod(0o755)
    monkeypatch.setenv("FUSE_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv(variable, value.replace("{folder}", str(folder)))
    with pytest.warns(RuntimeWarning, match=says.replace("{folder}", str(folder))) as told:
        assert ran().runs["forward"].by == "reference"
    assert not any("please report" in str(w.message) for w in told)


def test_target_reference_is_told_before_and_after_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        site = ran("reference", train=True)
    monkeypatch.setenv("FUSE_TARGET", "reference")
    (expected,) = fuse.explain(attention, *heads(grad=True)).sites
    for one in (site, expected):
        assert one.recovered and not one.fused
        assert {part: str(runs) for part, runs in one.runs.items()} == dict.fromkeys(
            ("forward", "backward"), "reference: target 'reference' asks for it"
        )


def test_the_reference_skips_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2])
        return (q @ k.mT).masked_fill(i > i[:, None], -1e9).softmax(-1) @ v

    x = heads(2048)
    assert "of the tiles" in str(fuse.explain(causal, *x))
    monkeypatch.setenv("FUSE_TARGET", "reference")
    assert "of the tiles" not in str(fuse.explain(causal, *x))


@pytest.mark.compiler
def test_some_sites_by_kernels_and_some_by_the_reference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(folder, monkeypatch, "attention_float32_16x16")
    wide = [torch.randn(1, 2, 64, 32) for _ in range(3)]
    with pytest.warns(RuntimeWarning, match=r"attention_float32_16x16.*\.cpp:1: error: refused"):
        compiled()(*heads())
        compiled()(*wide)
    assert fuse.report().summary == "2 attention sites, 1 fused, 1 by the reference"
    table = str(fuse.report())
    assert "  1  no  " in table and "  1  yes  " in table and ".cpp:1: error: refused" in table


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.compiler
def test_gradients_by_the_reference_are_told_with_one_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(folder, monkeypatch, "attention_backward")
    with pytest.warns(RuntimeWarning) as told:
        site = ran(train=True)
        ran(train=True)
    (warning,) = [str(w.message) for w in told if w.category is RuntimeWarning]
    assert "gradients" in warning and "memory" in warning and "attention_backward_float32" in warning and "refused" in warning
    assert site.fused and site.runs["forward"].by == "kernel" and site.runs["backward"].by == "reference"
    assert fuse.report().summary == "2 attention sites, 2 fused, gradients of 2 by the reference"
    assert "refused" in json.loads(fuse.report().to_json())["sites"][0]["runs"]["backward"]["why"]


def test_a_kernel_that_is_being_built_is_told_so_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    built, begun = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        assert built.wait(60)
        raise BuildFailed("too late")

    monkeypatch.setattr(target, "build_backward", slow)
    spec, wanted = CASES["plain"]("float32").spec, (True, True, True)
    site = Site(True, None, "model.py:7", "h.0", spec=spec, wanted=wanted, target="cpp")
    targets.prepare_backward(spec, "cpp", wanted)
    assert begun.wait(60)
    assert str(backend.with_runs(site).runs["backward"]) == "being built"
    built.set()
    with pytest.warns(RuntimeWarning, match="gradients.*too late"):
        targets.backward_kernel(spec, "cpp", wanted)
    assert str(backend.with_runs(site).runs["backward"]) == "reference: too late"


@pytest.mark.compiler
def test_a_map_that_has_no_kernel_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(folder, monkeypatch, "tile_map")
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    inputs = heads(300)
    with pytest.warns(RuntimeWarning, match=r"tiles of masks.*tile_map_.*\.cpp:1: error: refused") as told:
        for _ in range(2):
            run = compiled(program=masked)
            torch.testing.assert_close(run(*inputs, mask), masked(*inputs, mask), rtol=1e-4, atol=1e-5)
    assert len([w for w in told if w.category is RuntimeWarning]) == 1
    site = fuse.report().sites[0]
    assert site.fused and site.runs["tile map"].by == "reference" and "refused" in str(fuse.report())


def test_each_kind_has_a_warning_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(folder, monkeypatch)
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(2):
            ran(train=True)
    assert len([w for w in told if w.category is RuntimeWarning]) == 2  # results, and gradients


# ------------------------------------------------------------------------------------------------------- edited kernels


@pytest.fixture
def dumped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one file that a model has dumped, as a new process finds it."""
    monkeypatch.setenv("FUSE_DUMP", str(folder / "dump"))
    assert ran().runs["forward"].by == "kernel"
    fuse.reset()
    targets.reset()
    (file,) = (folder / "dump").glob("*.cpp")
    return file


@pytest.mark.compiler
def test_an_edited_kernel_is_what_runs_and_what_is_told(dumped: Path) -> None:
    text = dumped.read_text()
    dumped.write_text(text.replace("out_scale / l[v];", "R(2) * out_scale / l[v];"))
    inputs = heads()
    torch.testing.assert_close(compiled()(*inputs), 2 * attention(*inputs), rtol=1e-4, atol=1e-5)
    (site,) = fuse.report().sites
    assert site.fused and (site.runs["forward"].by, site.runs["forward"].file) == ("edited kernel", dumped)
    assert f"edited kernel {dumped}" in str(fuse.report())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "does not compile": (
        lambda file: file.write_text("int fine;\n#error half finished\n"),
        r"{file}:2:2: error:.*half finished",
    ),
    "empty": (lambda file: file.write_text(""), r"{file} cannot be built. Correct it, or delete it.*fuse_attention"),
    "no text": (lambda file: file.write_bytes(b"\xff\xfe"), r"FUSE_DUMP: {file} is no source.*Move it away"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), r"FUSE_DUMP: {file} is no source.*Move it away"),
}


@pytest.mark.compiler
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_edit_is_told_by_its_file_and_gone_with_it(dumped: Path, how: str) -> None:
    damage, says = BROKEN[how]
    text = dumped.read_text()
    damage(dumped)
    with pytest.warns(RuntimeWarning) as told:
        site = ran()
    (warning,) = [str(w.message) for w in told if w.category is RuntimeWarning]
    assert not site.fused and site.runs["forward"].by == "reference" and "please report" not in warning
    assert re.search(says.format(file=re.escape(str(dumped))), warning, re.DOTALL), warning
    dumped.rename(dumped.with_name("moved away"))
    fuse.reset()
    targets.reset()
    assert ran().runs["forward"].by == "kernel" and dumped.read_text() == text


# ---------------------------------------------------------------------------------------------------- refused at launch


@pytest.mark.triton
def test_what_triton_refuses_at_the_first_launch_is_told_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="no Triton on this platform")
    import triton_interpreter  # noqa: F401  mends the interpreter

    from fuse.targets.triton.function import CannotCompile
    from fuse.targets.triton.launch import TritonKernel

    def refused(*_: object) -> Tensor:
        raise CannotCompile("no such instruction")

    inputs = heads()
    run = compiled("triton")
    run(*inputs)
    assert fuse.report().fused == 1 and fuse.report().sites[0].runs["forward"].by == "kernel"
    monkeypatch.setattr(TritonKernel, "__call__", refused)
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        torch.testing.assert_close(run(*inputs), attention(*inputs), rtol=1e-4, atol=1e-5)
    assert fuse.report().summary == "1 attention site, 0 fused, 1 by the reference"
    assert str(fuse.report().sites[0].runs["forward"]) == "reference: no such instruction"


def test_a_site_of_which_nothing_is_known_any_more_keeps_what_was_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = ran("reference")
    targets.reset()
    assert fuse.report().sites == (site,) and replace(site, runs={}) != site
