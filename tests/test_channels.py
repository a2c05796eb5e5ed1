"""TORCH_LOGS and TORCH_TRACE, as a user sets them: no import of fuse, and nothing but torch's own channels."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fuse
from fuse import channels

PROGRAM = """
import sys, torch

def model(x, y):
    i = torch.arange(32)
    a = (x @ x.mT).masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ x
    score = y @ y.mT
    return a, score.softmax(-1) @ y, score

x = torch.randn(2, 32, 16)
torch.compile(model, backend="fuse", options={"inner": "eager", "qualify": "never"})(x, x)
"""


SOURCE = Path(torch.__file__).read_text()
asked_in_time = pytest.mark.skipif(
    SOURCE.rindex("_init_logs()") < SOURCE.rindex("_import_device_backends()"),
    reason="this torch reads TORCH_LOGS before it calls entry points",
)


def ran(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_")} | variables
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def records(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """The trace: a line of JSON for each record, and its text behind it, a tab before each line."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    (file,) = folder.glob("*.log")
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            found[-1][1].append(line[1:])
        else:
            found.append((json.loads(line[line.index("{") :]), []))
    return [(described, "\n".join(lines)) for described, lines in found]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run prints, and the folder of its trace and of TORCH_LOGS_OUT."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "model.py").write_text(PROGRAM)
    program = f"import runpy; runpy.run_path({str(folder / 'model.py')!r})"
    done = ran(program, TORCH_LOGS="fuse,fuse_sites,fuse_kernels", TORCH_TRACE=str(folder), TORCH_LOGS_OUT=str(folder / "out"))
    assert done.returncode == 0, done.stderr
    return done.stderr, folder


@pytest.mark.compiler
def test_torch_logs_fuse_says_what_became_of_every_site(told: tuple[str, Path]) -> None:
    assert re.search(r"\[0/0\] model\.py:\d+: fused, mask k <= q: forward by kernel /.*causal_float32_16x16", told[0])
    assert re.search(r"\[0/0\] model\.py:\d+: left as it was: ProbabilitiesUsed: .* To fuse it: use the weights that", told[0])


@pytest.mark.compiler
def test_artifacts_have_formula_sizes_and_sources(told: tuple[str, Path]) -> None:
    assert re.search(r"\[__fuse_sites\]     visible where k <= q, that is k < 1 \+ q\n", told[0])
    assert "[__fuse_sites]     sizes: B0 = 2, q_len = 32, kv_len = 32\n" in told[0]
    assert re.search(r"\[__fuse_kernels\] causal_float32_16x16, kernel causal_float32_16x16_\w+-\w+\.cpp\n", told[0])
    assert "[__fuse_kernels] #define FUSE_WIDTH" in told[0]
    out = (told[1] / "out").read_text()
    assert "fused, mask k <= q" in out and "[__fuse_kernels]" in out


@pytest.mark.compiler
def test_the_structured_trace_has_sites_reasons_and_kernels_of_the_graph(told: tuple[str, Path]) -> None:
    found = {
        d["artifact"]["name"]: (d, text) for d, text in records(told[1]) if "fuse" in d.get("artifact", {}).get("name", "")
    }
    assert set(found) == {"fuse_sites", "fuse_kernel_causal_float32_16x16"}
    described, text = found["fuse_sites"]
    assert (described["artifact"]["encoding"], described["frame_id"], described["frame_compile_id"]) == ("json", 0, 0)
    by_name = {(site["reason"] or {"name": ""})["name"]: site for site in json.loads(text)}
    assert by_name[""]["fused"] and by_name[""]["sizes"] == {"B0": 2, "q_len": 32, "kv_len": 32}
    assert "also used by" in by_name["ProbabilitiesUsed"]["reason"]["text"] and not by_name["ProbabilitiesUsed"]["fused"]
    described, text = found["fuse_kernel_causal_float32_16x16"]
    assert described["artifact"]["encoding"] == "string" and text.startswith("// out = sum over k of w * value")


@asked_in_time
def test_help_lists_the_names_and_imports_nothing() -> None:
    done = ran("import torch", TORCH_LOGS="help")
    shown = done.stderr
    assert re.search(r"\n  fuse\n", shown) and re.search(r"\n  fuse_sites\s.*formula", shown) and "\n  fuse_kernels" in shown
    quiet = ran("import torch, sys; print('fuse' in sys.modules)", TORCH_LOGS="fuse_sites")
    assert (quiet.stdout, quiet.returncode) == ("False\n", 0), quiet.stderr


def test_where_torch_calls_no_entry_points_fuse_by_its_name_makes_the_others_known() -> None:
    program = "import torch, logging; print(logging.getLogger('fuse').level, torch._logging._internal.log_state.artifact_names)"
    done = ran(program, TORCH_LOGS="fuse,fuse_sites", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout == f"{logging.INFO} {{'fuse_sites'}}\n", done.stderr


@asked_in_time
def test_a_module_of_fuse_can_be_listened_to_by_its_name() -> None:
    program = "import torch, logging; print(logging.getLogger('fuse.qualify.judge').level, logging.getLogger('fuse').level)"
    done = ran(program, TORCH_LOGS="+fuse.qualify.judge")
    assert done.stdout == f"{logging.DEBUG} {logging.NOTSET}\n", done.stderr


def attention(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def test_what_cannot_be_told_costs_nobody_the_model(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(channels, "_line", lambda site: 1 / 0)
    x = torch.randn(2, 8, 4)
    with caplog.at_level(logging.DEBUG, "fuse"):
        torch.compile(attention, backend="fuse", options={"inner": "eager", "target": "reference"})(x)
    assert fuse.report().recovered == 1 and "a graph's sites could not be told" in caplog.text


def test_a_graph_that_nobody_looked_into_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fuse"):
        torch.compile(attention, backend="fuse", options={"inner": "eager", "disable": True})(torch.randn(2, 8, 4))
    assert "a graph was not looked into: fuse is disabled" in caplog.text
