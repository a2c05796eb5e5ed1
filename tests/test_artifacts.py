"""torch.compiler.save_cache_artifacts() takes fuse's kernels along, and load_cache_artifacts() spares their builds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fuse.targets import adopt, artifacts, records
from fuse.targets.cache import Entry, builds, entry, write_once

# Compiles and trains an attention; argv: what to do with artifacts, and their file. Prints what it has found and built.
PROGRAM = """
import json, sys
from pathlib import Path
import torch, fuse
from fuse import targets
from fuse.qualify import judge

def attention(q, k, v):
    i = torch.arange(q.shape[-2])
    return (q @ k.mT * 0.25).masked_fill(i > i[:, None], float("-inf")).softmax(-1) @ v

loaded, file = None, Path(sys.argv[2])
if sys.argv[1] == "load":
    loaded = torch.compiler.load_cache_artifacts(file.read_bytes())
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 40, 16).unbind(0)
q.requires_grad_()
judged, judge._judged = [], lambda *of, was=judge._judged: judged.append(of) or was(*of)
judge._timed = lambda *of: judge._KEPT  # be it faster or not
out = torch.compile(attention, backend="fuse", options={"qualify": "once"})(q, k, v)
out.square().sum().backward()
if sys.argv[1] == "save":
    file.write_bytes(torch.compiler.save_cache_artifacts()[0])
assert fuse.report().sites[0].runs["backward"].by == "kernel", fuse.report()
found = [] if loaded is None else sorted(name.rpartition("-")[0] for name in loaded.fuse_artifacts)
print(json.dumps([targets.builds.count, len(judged), found, out.sum().item(), q.grad.sum().item()]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / "cache"))
    artifacts_of_torch().clear()
    yield tmp_path / "cache" / "test"
    artifacts_of_torch().clear()


def artifacts_of_torch() -> type[torch.compiler._cache.CacheArtifactManager]:
    found = artifacts.manager()
    assert found is not None, "torch has changed torch.compiler._cache: mend fuse/targets/artifacts.py"
    return found


def saved() -> bytes:
    found = torch.compiler.save_cache_artifacts()
    assert found is not None
    return found[0]


def made(depends: str = "this compiler") -> Entry[str]:
    def build(source: Path, binary: Path) -> None:
        binary.write_text(source.read_text())

    return entry("test", "kernel", ".txt", "text", depends, build, Path.read_text)


def in_an_empty_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, data: bytes) -> Path:
    """What is loaded there."""
    other = folder.parent.with_name("other")
    monkeypatch.setenv("FUSE_CACHE_DIR", str(other))
    torch.compiler.load_cache_artifacts(data)
    return other / "test"


@pytest.mark.compiler
def test_a_new_process_with_an_empty_cache_builds_and_judges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(does: str) -> list[object]:
        monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / does))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"{does}-inductor"))
        command = [sys.executable, "-c", PROGRAM, does, str(tmp_path / "artifacts")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    first, second = process("save"), process("load")
    assert first[:3] == [3, 1, []]  # two kernels, and what calls them
    kernels = ["cpp/causal_backward_float32_16x16", "cpp/causal_float32_16x16"]
    found = second[2]
    assert second[:2] == [0, 0] and isinstance(found, list) and len(found) == 4
    assert [name.rpartition("_")[0] for name in found[:2]] == kernels and found[2:] == ["cpp/op", "cpp/verdict"]
    assert second[3:] == first[3:]


def test_kernels_sources_and_records_are_saved_and_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    source = write_once("test", "module", ".py", "x = 1\n")
    records.write(folder / "verdict-0123456789abcdef0123.json", {"verdict": "kept"})
    before, data = builds.count, saved()
    other = in_an_empty_cache(monkeypatch, folder, data)
    assert {path.name for path in other.iterdir()} - {path.name for path in folder.iterdir()} == set()
    assert made().loaded == "text" and builds.count == before
    assert (other / source.name).read_text() == "x = 1\n"
    assert records.read(other / "verdict-0123456789abcdef0123.json") == {"verdict": "kept"}


def test_what_was_found_in_the_cache_is_saved_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    artifacts_of_torch().clear()
    made()
    other, before = in_an_empty_cache(monkeypatch, folder, saved()), builds.count
    assert made().binary.parent == other and builds.count == before


def test_a_kernel_of_another_compiler_is_not_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("another compiler")
    in_an_empty_cache(monkeypatch, folder, saved())
    before = builds.count
    made()
    assert builds.count == before + 1


def archive(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("kernel-*") if path.suffix != ".lock"}


HARM: dict[str, Callable[[str, dict[str, bytes]], object]] = {
    "a library that is not the one": lambda name, files: files.update({f"{name}.so": b"other"}),
    "a source that is not the one": lambda name, files: files.update({f"{name}.txt": b"other"}),
    "no manifest": lambda name, files: files.pop(f"{name}.json"),
    "another file beside it": lambda name, files: files.update({"sitecustomize.py": b""}),
    "a lock": lambda name, files: files.update({f"{name}.lock": b""}),
    "a place elsewhere": lambda name, files: files.update({f"../{name}.so": files[f"{name}.so"]}),
    "nothing": lambda name, files: files.clear(),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_not_whole_is_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    name = made().source.stem
    files = archive(folder)
    artifacts_of_torch().clear()
    HARM[harm](name, files)
    artifacts.keep("test", name, files)
    other = in_an_empty_cache(monkeypatch, folder, saved())
    assert not other.exists() and f"test/{name}, is not used: " in caplog.text


@pytest.mark.parametrize("target", ["..", "", "/tmp", "a/b"])
def test_nothing_is_stored_elsewhere(folder: Path, target: str) -> None:
    made()
    name = next(iter(archive(folder))).partition(".")[0]
    with pytest.raises(adopt.Refused, match="no artifact of fuse"):
        adopt.take(target, name, archive(folder))


def test_what_is_there_and_whole_is_left_as_it_is_and_what_is_broken_is_mended(folder: Path) -> None:
    made()
    files, name = archive(folder), made().source.stem
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    adopt.take("test", name, files)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (folder / f"{name}.so").write_bytes(b"other")
    adopt.take("test", name, files)
    assert archive(folder) == files


def test_a_folder_that_everybody_can_write_to_gets_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made()
    data = saved()
    folder.parent.with_name("other").mkdir()
    folder.parent.with_name("other").chmod(0o777)
    other = in_an_empty_cache(monkeypatch, folder, data)
    assert not other.exists() and "everybody can write to" in caplog.text


def test_garbage_is_no_archive(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    artifacts_of_torch().record_artifact(artifacts.TYPE, "test/kernel", b"garbage")
    in_an_empty_cache(monkeypatch, folder, saved())
    assert "test/kernel, is not used: File is not a zip file" in caplog.text


def test_a_torch_that_has_changed_costs_no_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "manager", lambda: None)
        assert made().loaded == "text"
