"""python -m fuse.alone: kernels by themselves, at the sizes and strides of their sites."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fuse import alone, targets
from fuse.ir.spec import AttentionSpec
from fuse.kernel.source import header_of
from fuse.qualify.problem import strides_as

pytestmark = pytest.mark.compiler


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).masked_fill(mask, -torch.inf).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT) * 30.0).softmax(-1) @ v


def plain(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ k


def heads_last(length: int) -> Tensor:
    return torch.randn(1, length, 2, 16).transpose(1, 2).requires_grad_()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of two models, in training, whose operands lie across memory."""
    folder = tmp_path_factory.mktemp("dump")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSE_DUMP", str(folder))
        targets.reset()
        for program in (masked, capped):
            q, k, v = heads_last(300), heads_last(300), heads_last(300)
            options = {"inner": "eager", "qualify": "never"}
            run = torch.compile(program, backend="fuse", options=options)
            run(q, k, v, torch.rand(1, 1, 300, 300) < 0.5).sum().backward()
        targets.reset()
    return folder


def one(folder: Path, start: str) -> Path:
    (file,) = folder.glob(f"{start}_*.cpp")
    return file


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def body(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            status = alone.main([*map(str, arguments)])
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return body


def test_a_kernel_runs_at_the_sizes_and_strides_of_its_site(folder: Path, run: Run) -> None:
    status, out, _ = run(one(folder, "masked_float32"), "--threads", "1")
    assert status == 0
    where = r"test_alone\.py:\d+"
    assert re.search(rf"\n  {where}\n  B0 = 1, B1 = 2, q_len = 300, kv_len = 300\n", out), out
    assert "  k  float32 [1, 2, 300, 16], strides [0, 16, 32, 1]\n" in out and "  mask  bool [1, 1, 300, 300], strides [" in out
    assert "visible where not(" in out
    assert re.search(r"\n    error \d\.\de-\d\d of the result where eager has \d\.\de-\d\d, at \[0, \d, \d+, \d+\]\n", out)
    assert re.search(r"\n    time \S+ ms, scaled_dot_product_attention \S+ ms, 1 thread\n", out)


@pytest.mark.parametrize("shape", [(1, 8, 300, 64), (3, 49, 7, 11)])
def test_a_view_of_a_much_larger_tensor_keeps_its_strides(shape: tuple[int, ...]) -> None:
    view = torch.empty(shape[0], shape[1], 40 * shape[2] + 1, shape[3], device="meta")[:, :, : shape[2]]
    assert strides_as(view, shape, sys.maxsize)[1:] == list(view.stride())[1:] != strides_as(view, shape)[1:]


def test_gradients_run_alone_beside_the_backward_pass_of_sdpa(folder: Path, run: Run) -> None:
    status, out, _ = run(one(folder, "masked_backward"))
    assert status == 0 and len(re.findall(r"error \S+ of the gradient of operand \d", out)) == 3
    assert "of the result" not in out and "scaled_dot_product_attention" in out


def test_what_sdpa_cannot_say_is_timed_alone(folder: Path, run: Run) -> None:
    status, out, _ = run(one(folder, "softcap_float32"))
    assert status == 0 and re.search(r"\n    time \S+ ms, \d threads?\n", out), out


def test_a_map_of_tiles_runs_alone(folder: Path, run: Run) -> None:
    status, out, _ = run(one(folder, "tile_map"))
    assert status == 0 and "0 of 95 cells are not as the reference has them\n" in out and " ms" in out


def test_a_kernel_of_a_view_runs_at_the_strides_of_the_call(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_DUMP", str(tmp_path))
    targets.reset()
    cache = torch.randn(1, 2, 2000, 16)
    with torch.no_grad():
        torch.compile(plain, backend="fuse", options={"inner": "eager", "qualify": "never"})(
            cache[:, :, :50], cache[:, :, 50:99]
        )
    status, out, _ = run(one(tmp_path, "attention_float32"), "--no-times")
    assert status == 0 and out.count("strides [0, 32000, 16, 1]") == 2, out


def test_a_kernel_that_nobody_called_runs_at_sizes_of_its_own(folder: Path, tmp_path: Path, run: Run) -> None:
    there = tmp_path / "there.cpp"
    there.write_text(one(folder, "masked_float32").read_text())
    for arguments in ([there], [one(folder, "masked_float32"), "--example"]):
        status, out, _ = run(*arguments, "--no-times")
        assert status == 0 and "\n  sizes of its own\n  B0 = 1, B1 = 8, q_len = 512, kv_len = 512\n" in out and " ms" not in out


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "says"),
    [
        ("masked_float32", "out_scale / l[v];", "R(2) * out_scale / l[v];", "of the result"),
        ("masked_backward", "const VR d_score = prob *", "const VR d_score = R(2) * prob *", "of the gradient of operand"),
        ("tile_map", "any ? 1 : 2", "any ? 2 : 1", "cells are not as the reference has them: WRONG"),
    ],
)
def test_a_wrong_kernel_ends_with_status_1_and_says_where(
    folder: Path, tmp_path: Path, run: Run, kind: str, right: str, wrong: str, says: str
) -> None:
    text = one(folder, kind).read_text()
    assert right in text
    file = tmp_path / "edited.cpp"
    file.write_text(text.replace(right, wrong))
    status, out, _ = run(file, "--no-times")
    assert status == 1 and says in out and "WRONG" in out


def test_scores_that_do_not_fit_into_memory_are_compared_at_smaller_sizes(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuse.qualify.faster._free", lambda device: 1000.0)
    status, out, _ = run(one(folder, "masked_float32"))
    assert status == 0 and "q_len = 149, kv_len = 149, for want of memory or of a GPU\n" in out
    assert "float32 [1, 2, 149, 16], strides [0, 16, 32, 1]" in out and "scaled_dot_product" not in out


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("missing.cpp", None, "it cannot be read: "),
        ("notes.txt", "x", "it is no kernel of fuse"),
        ("bare.cpp", "int x;", "no line with the spec"),
        ("cut.cpp", '// spec  {"version":', "no line with the spec"),
        ("broken.cpp", "{header}\n#error half finished\n", "half finished"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_with_why(
    folder: Path, tmp_path: Path, run: Run, name: str, text: str | None, says: str
) -> None:
    if text is not None:
        header = "\n".join(line for line in one(folder, "masked_float32").read_text().splitlines() if line.startswith("// "))
        (tmp_path / name).write_text(text.replace("{header}", header))
    status, _, err = run(tmp_path / name)
    assert status == 2 and err.startswith(f"{tmp_path / name}: ") and says in err, err


def test_threads_are_counted_from_one(folder: Path, run: Run) -> None:
    status, _, err = run(one(folder, "masked_float32"), "--threads", "0")
    assert status == 2 and "--threads 0: give 1 or more" in err


def test_it_is_a_command_with_help() -> None:
    done = subprocess.run([sys.executable, "-m", "fuse.alone", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m fuse.alone ") and "--no-times" in done.stdout
    assert " ".join(done.stdout.split()).count("largest error against float64")


def test_headers_are_read_back(folder: Path) -> None:
    header = header_of(one(folder, "masked_backward").read_text())
    assert header.formula == (
        "gradients of query, key, value, as fuse.ir.gradient has them, of",
        "out = sum over k of w * value,  w = prob",
        "softmax over k of where(operand0[0, 0, q, k], -inf, score * 0.25)",
        "visible where not(operand0[0, 0, q, k])",
    )
    assert sum(header.wanted) == 3 and "isa=" in header.plan and not header.of_map
    assert AttentionSpec.from_json(header.spec).batch == 2
    of_map = header_of(one(folder, "tile_map").read_text())
    assert of_map.of_map and of_map.formula == ("which tiles hold an entry where not(operand0[0, 0, q, k])",)
