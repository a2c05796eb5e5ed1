"""Options and variables: what is allowed is taken, everything else is refused with what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fuse import errors
from fuse.options import Options, resolve
from fuse.settings import settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUSE_TARGET", "FUSE_INNER", "FUSE_DISABLE", "FUSE_VERIFY", "FUSE_TUNE", "FUSE_DUMP", "FUSE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_are_inductor_and_what_the_machine_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSE_QUALIFY")
    assert resolve(None, None) == Options(target="auto", inner="inductor", disable=False, verify=False)


def test_an_option_wins_over_its_variable_and_the_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_INNER", "eager")
    assert resolve(None, None).inner == "eager"
    assert resolve(None, {"inner": "aot_eager"}).inner == "aot_eager"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("", False), ("OFF", False)])
def test_switches_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("FUSE_DISABLE", text)
    assert resolve(None, None).disable is value


def test_inductor_options_and_mode_are_passed_through() -> None:
    chosen = resolve("reduce-overhead", {"max_autotune": True, "triton.cudagraphs": False})
    assert chosen.mode == "reduce-overhead"
    assert chosen.inductor == {"max_autotune": True, "triton.cudagraphs": False}


def test_options_that_are_made_already_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_INNER", "aot_eager")
    chosen = Options(target="reference", inner="eager")
    assert resolve(None, chosen) == chosen
    x = torch.randn(2, 8, 4)
    attention = torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q, backend="fuse", options=chosen)
    torch.testing.assert_close(attention(x), (x @ x.mT).softmax(-1) @ x)
    with pytest.raises(errors.UnknownOption, match="'max_autotunee'"):
        resolve(None, Options(inductor={"max_autotunee": True}))


def test_an_unknown_option_is_refused_with_the_closest_name() -> None:
    with pytest.raises(errors.UnknownOption, match=r"'tagret'.*Did you mean 'target'\?.*'inner'"):
        resolve(None, {"tagret": "cpp"})


def test_a_misspelt_inductor_option_is_refused_with_the_closest_name() -> None:
    with pytest.raises(errors.UnknownOption, match=r"Did you mean 'max_autotune'"):
        resolve(None, {"max_autotunee": True})


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("target", "cp", r"'cp'.*'auto', 'cpp', 'triton', 'reference'.*Did you mean 'cpp'"),
        ("inner", "onnx", r"'onnx'.*'inductor', 'aot_eager', 'eager'"),
        ("disable", 1, r"1; allowed: False, True"),
        ("verify", "yes", r"'yes'; allowed: False, True"),
        ("target", ["cpp"], r"\['cpp'\]"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(option: str, value: Any, says: str) -> None:
    with pytest.raises(errors.InvalidOption, match=says):
        resolve(None, {option: value})


def test_a_wrong_variable_is_refused_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_TARGET", "gpu")
    with pytest.raises(errors.InvalidVariable, match=r"FUSE_TARGET='gpu'.*'auto', 'cpp'"):
        resolve(None, None)


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_DISABEL", "1")
    with pytest.raises(errors.UnknownVariable, match=r"Did you mean 'FUSE_DISABLE'"):
        resolve(None, None)


def test_variables_of_other_software_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSE_QUALIFY")
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "/usr/lib/libfuse.so")  # fusepy
    assert resolve(None, None) == Options()


@pytest.mark.parametrize("target", ["auto", "cpp", "reference"])
def test_tuning_is_for_kernels_that_have_a_choice(target: str) -> None:
    assert resolve(None, {"target": "triton", "tune": True}).tune
    with pytest.raises(errors.NotTunable, match=f"'tune'.*'{target}'.*drop it.*'triton'"):
        resolve(None, {"target": target, "tune": True})


@pytest.mark.parametrize(("mode", "given"), [("max-autotune", {}), (None, {"max_autotune": True})])
def test_what_only_inductor_understands_needs_inductor(mode: str | None, given: dict[str, Any]) -> None:
    with pytest.raises(errors.InductorOnly, match="drop it"):
        resolve(mode, {"inner": "eager", **given})


def test_cache_and_dump_folders_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settings().dump is None
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FUSE_DUMP", str(tmp_path / "dump"))
    assert (settings().cache_dir, settings().dump) == (tmp_path / "cache", tmp_path / "dump")


@pytest.mark.parametrize("variable", ["FUSE_CACHE_DIR", "FUSE_DUMP"])
def test_without_a_home_directory_the_variable_to_set_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    """As for a user whom the system does not know, in a container say."""

    def unknown(path: str) -> str:
        return path

    monkeypatch.setattr(os.path, "expanduser", unknown)
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(variable, "~/kernels")
    with pytest.raises(errors.NoHome, match=f"~/kernels.*no home directory: set {variable} to a folder, or HOME"):
        settings()


def test_a_dump_folder_that_is_a_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSE_DUMP", str(tmp_path / "file"))
    with pytest.raises(errors.InvalidVariable, match=r"FUSE_DUMP=.*a folder"):
        settings()
