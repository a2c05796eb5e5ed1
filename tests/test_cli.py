"""python -m fuse, as people type it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuse.__main__ import main

MODEL = """
import torch

class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * 0.25
        return scores.softmax(-1) @ v

def build():
    x = torch.randn(1, 2, 32, 16)
    return Attention(), (x, x, x)

class Causal(torch.nn.Module):
    def forward(self, q, k, v):
        i = torch.arange(32)
        scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(i > i[:, None], float("-inf"))
        return scores.softmax(-1) @ v

def causal():
    return Causal(), build()[1]

def wrong():
    return Attention()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def test_explain_reads_a_model_from_a_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:build"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 attention site, 1 fused")
    assert "model.py:6" in shown or "model.py:7" in shown


def test_explain_prints_what_each_pass_made_of_a_site(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:causal", "--passes"]) == 0
    shown = capsys.readouterr().out
    lifted, masked = shown.index("\nlift\n"), shown.index("\nrecover_mask\n")
    assert "softmax over k of where(k > q, -inf, score * 0.25)" in shown[lifted:masked]
    assert "visible where" not in shown[:masked] and "visible where k <= q, that is k < 1 + q" in shown[masked:]
    assert "\ntabulate\n    as before\n" in shown
    assert main(["explain", f"{model}:causal", "--passes", "2"]) == 0
    assert capsys.readouterr().out == "no site 2: 1 attention site, 1 fused\n"


def test_explain_gives_json_and_html(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", f"{model}:build", "--json"])
    assert json.loads(capsys.readouterr().out)["sites"][0]["fused"] is True
    main(["explain", f"{model}:build", "--html", str(tmp_path / "page.html")])
    assert "1 attention site, 1 fused" in (tmp_path / "page.html").read_text()


def test_explain_takes_a_transformers_type_without_touching_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["explain", "llama", "--layers", "2"]) == 0  # 7B in shape
    assert "2 attention sites, 2 fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:build", "No module named 'no_such_module'"),
        ("missing.py:build", "No such file"),
        ("json:build", "no attribute 'build'"),
        ("gtp2", "Did you mean 'gpt2'?"),
    ],
)
def test_a_name_that_is_no_model_is_an_error_with_a_next_step(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == 2
    assert says in capsys.readouterr().err


def test_a_callable_that_returns_no_inputs_is_told_what_to_return(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:wrong"]) == 2
    assert "it should return (model, args)" in capsys.readouterr().err


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one kernel, in a folder that also holds something else."""
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "attention-1234.cpp").write_text("// model.py:7\n// score * 0.25\n#include <math.h>\n")
    (tmp_path / "cpp" / "attention-1234.so").write_bytes(bytes(2**20))
    (tmp_path / "mine.txt").touch()
    return tmp_path


def test_kernels_lists_sources_with_what_they_compute(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(cache / "cpp" / "attention-1234.cpp"), "    model.py:7", "    score * 0.25",
    ]  # fmt: skip


def test_cache_clear_deletes_kernels_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    assert "1 kernel, 1.0 MB" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert [path.name for path in cache.iterdir()] == ["mine.txt"]


def test_it_is_a_program(cache: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "fuse", "cache"], capture_output=True, text=True)
    assert done.returncode == 0 and str(cache) in done.stdout
