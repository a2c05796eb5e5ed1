"""python -m fuse, as people type it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from expected_text import compare
from rich.console import Console

import fuse
from fuse import targets
from fuse.cli import main
from fuse.cli.parser import parsers
from fuse.cli.table import table
from fuse.errors import CallFailed, NotCallable

MODELS = Path(__file__).parent / "cli_models.py"
COMMANDS = tuple(parsers()[1])
EXPECTED = Path(__file__).parent / "expected_output"

MISTAKES = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        return (y @ y.mT).softmax(-1) @ y

def build():
    return Model(), (torch.randn(1, 5, 8),)

def wrong_shape():
    return Model(), (torch.randn(1, 5, 7),)

def size(name):
    return {"width": 8}[name]

def raises():
    return Model(), (torch.randn(1, 5, size("height")),)

def no_arguments():
    return Model()

def needs(width):
    return Model(), (torch.randn(1, 5, width),)

def takes(batch, dtype):
    return Model().to(dtype), (torch.randn(batch, 5, 8, dtype=dtype),)

not_callable = 3
"""


@pytest.fixture(autouse=True)
def torch_may_log() -> Iterator[None]:
    level, path = logging.getLogger("torch").level, list(sys.path)
    yield
    logging.getLogger("torch").setLevel(level)
    sys.path[:] = path


@pytest.fixture
def mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with mistakes.py, which is where the shell is."""
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def out(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(words) == status
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- what is found, as text


@pytest.mark.models
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "swin"])
def test_what_explain_prints_of_a_model_of_transformers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    compare(EXPECTED / f"{name}.txt", portable(out(capsys, "explain", f"{MODELS}:{name}")))


@pytest.mark.parametrize("name", ["flex", "both", "nothing"])
def test_what_explain_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    compare(EXPECTED / f"{name}.txt", portable(out(capsys, "explain", f"{MODELS}:{name}")))


def portable(text: str) -> str:
    """Without lines of source, and the share of tiles that the processor's tile sizes decide."""
    return re.sub(r"\d+ % of the tiles|nothing, .*?(?= \()", "… % of the tiles", re.sub(r"\.py:\d+ *", ".py:… ", text))


def test_a_terminal_is_shown_the_same_in_colour_within_its_width() -> None:
    report = fuse.explain(*_call("both"))
    console = Console(force_terminal=True, color_system="standard", width=60)
    with console.capture() as captured:
        console.print(table(report))
    shown = captured.get()
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert shown != plain and max(map(len, plain.splitlines())) <= 60
    assert "2 attention sites, 1 fused" in plain and "✓ 1 site" in plain and "✗ 1 site" in plain
    assert "to fuse it" in plain and "score / 4" in plain


def _call(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    import cli_models

    model, (x,) = getattr(cli_models, name)()
    return model, x


def test_explain_prints_what_each_pass_made_of_a_site(capsys: pytest.CaptureFixture[str]) -> None:
    shown = out(capsys, "explain", f"{MODELS}:causal", "--passes")
    lifted, masked = shown.index("\nlift\n"), shown.index("\nrecover_mask\n")
    assert "softmax over k of where(k > q, -inf, score / 4)" in shown[lifted:masked]
    assert "visible where" not in shown[:masked] and "visible where k <= q, that is k < 1 + q" in shown[masked:]
    assert "\ntabulate\n    as before\n" in shown
    assert out(capsys, "explain", f"{MODELS}:causal", "--passes", "2") == "no site 2: 1 attention site, 1 fused\n"


def test_json_has_all_that_is_known_and_a_page_may_be_asked_for_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    found = json.loads(out(capsys, "explain", f"{MODELS}:both", "--train", "--json", "--html", str(page)))
    assert "2 attention sites, 1 fused" in page.read_text()
    fused, left = found["sites"]
    assert (fused["fused"], left["fused"], left["reason"]["name"]) == (True, False, "ProbabilitiesUsed")
    assert fused["sizes"]["q_len"] == 48 and fused["operands"][0]["name"]
    assert f"torch {torch.__version__}" in found["with"] and found["model"] == "Both" and found["inputs"]
    assert found["kernels"][fused["sources"]["result"]]["text"].startswith("// ")
    assert fused["passes"].keys() >= {"lift", "recover_mask"} and fused["calls"][-1]["line"]


def test_json_says_which_gradients_are_wanted_and_has_their_kernel() -> None:
    x = torch.randn(1, 48, 16, requires_grad=True)
    found = json.loads(fuse.explain(lambda q: (q @ q.mT / 4).softmax(-1) @ q, x).to_json())
    (site,) = found["sites"]
    assert [operand["gradient"] for operand in site["operands"]] == [True]
    assert found["kernels"][site["sources"]["gradients"]]["computes"] == "gradients"


# ------------------------------------------------------------------------------------------------------------- for CI


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("causal", 0, ()),
        ("both", 1, ("cli_models.py:", "ProbabilitiesUsed", "to fuse it: use the weights that")),
        ("nothing", 1, ("no attention was found",)),
    ],
)
def test_require_all_fails_unless_there_is_attention_and_all_is_fused(
    name: str, status: int, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{MODELS}:{name}", "--require-all"]) == status
    said = capsys.readouterr().err
    assert all(text in said for text in says) and ("--require-all:" in said) == bool(status)


def test_require_all_is_not_met_by_plain_pytorch_or_by_a_target_for_other_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{MODELS}:causal", "--require-all", "--target", "reference"]) == 1
    assert "computed by plain PyTorch" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the call


@pytest.mark.models
def test_explain_takes_a_type_and_its_call_without_touching_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    words = ("--layers", "2", "--length", "100", "--batch", "3", "--dtype", "bfloat16", "--padding", "left")
    found = json.loads(out(capsys, "explain", "llama", *words, "--json"))  # 7B in shape
    assert found["fused"] == 2 and "k <= q and attention_mask[k] != 0" in found["sites"][0]["mask"]
    assert found["inputs"] == ["input_ids int64 [3, 100]", "attention_mask int64 [3, 100]"]
    assert found["sites"][0]["sizes"]["kv_len"] == 100 and '"bfloat16"' in json.dumps(found["sites"][0]["spec"]["operands"])


def test_a_function_is_given_what_was_asked_for(mistakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(out(capsys, "explain", "mistakes.py:takes", "--batch", "4", "--dtype", "float64", "--json"))
    assert found["inputs"] == ["args[0] float64 [4, 5, 8]"]
    found = json.loads(out(capsys, "explain", "mistakes.py:build", "--dtype", "float64", "--json"))
    assert found["inputs"] == ["args[0] float64 [1, 5, 8]"]  # which takes none, so that its result is converted


def test_a_file_finds_what_lies_beside_it_and_dataclasses_their_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "layers_of_mine.py").write_text(MISTAKES)
    (tmp_path / "model_of_mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom layers_of_mine import build as made\n"
        "@dataclass\nclass Config:\n    width: int = 8\ndef build(): return made()\n"
    )
    assert out(capsys, "explain", f"{tmp_path}/model_of_mine.py:build").startswith("1 attention site, 1 fused")


def test_modules_are_found_in_the_folder_where_the_shell_is(mistakes: Path) -> None:
    done = subprocess.run([program(), "explain", "mistakes:build"], capture_output=True, text=True)
    assert done.stdout.startswith("1 attention site, 1 fused"), done.stderr


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("explane gpt2", "no command 'explane'. Did you mean 'explain'?"),
        ("explain gpt2 --lenght 5", "no option '--lenght'. Did you mean '--length'?"),
        ("explain gpt2 llama", "no place for 'llama'"),
        ("explain mistakes.py", "Add one, as in mistakes.py:build."),
        ("explain mistakes.py:biuld", "transformers model type. Did you mean 'build'?"),
        ("explain mistakes.py:not_callable", "'not_callable' cannot be called"),
        ("explain mistaken.py:build", "transformers model type. Did you mean 'mistakes.py'?"),
        ("explain no_such_module:build", "No module named 'no_such_module'"),
        ("explain json:build", "json has no callable 'build'"),
        ("explain mistakes.py:raises", "mistakes.py:raises failed: KeyError: 'height' (mistakes.py:20, in size: return"),
        ("explain mistakes.py:wrong_shape", "[5, 7] X [8, 8]. (mistakes.py:10, in forward: y = self.linear(x))"),
        ("explain mistakes.py:no_arguments", "returned Model; it should return (model, args)"),
        ("explain mistakes.py:needs", "needs 'width'. Give that a default."),
        ("explain mistakes.py:build --length 5", "takes no 'length'. Give it a parameter of that name, or drop --length."),
        ("explain mistakes.py:build --html none/page.html", "there is no folder none. Create it (mkdir -p none)"),
        ("explain mistakes.py:build --html .", "it is a folder"),
        ("explain mistakes.py:build --target ccp", "'ccp'; allowed: 'auto', 'cpp', 'triton', 'reference'. Did you mean 'cpp'?"),
        ("explain mistakes.py:build --device cude", "allowed: cpu, or a GPU: cuda, cuda:1 …. Did you mean 'cuda'?"),
        ("tune mistakes.py:build --device cude", "needs a GPU" if not torch.cuda.is_available() else "cude"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_a_next_step(
    words: str, says: str, mistakes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(words.split()) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert len(said) == 1 and says in said[0]


@pytest.mark.models
@pytest.mark.parametrize(
    ("words", "says"), [("explain gtp2", "Did you mean 'gpt2'?"), ("explain mistakes", "Did you mean mistakes.py:build?")]
)
def test_a_type_that_there_is_not(words: str, says: str, mistakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(words.split()) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("words", [["explain", "gpt2", "--layers", "0"], ["bench", "gpt2", "--rounds", "-3"]])
def test_numbers_are_checked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "give a whole number, 1 or more" in capsys.readouterr().err


def test_arguments_as_one_tuple_are_told_apart() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ k

    x = torch.randn(1, 5, 8)
    with pytest.raises(CallFailed, match=r"write fuse.explain\(model, \*args\)"):
        fuse.explain(attention, (x, x))
    assert fuse.explain(lambda both: attention(*both), (x, x)).fused == 1  # which takes one


def test_a_name_is_no_model_in_python() -> None:
    with pytest.raises(NotCallable, match="not 'gpt2'. python -m fuse explain gpt2 takes names"):
        fuse.explain("gpt2")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- kernels, cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one kernel that was never built, in a folder that also holds something else."""
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / f"attention-{'0a' * 10}.cpp").write_text("// model.py:7\n// score * 0.25\n#define WIDTH 16\n")
    (tmp_path / "mine.txt").touch()
    return tmp_path


def test_kernels_lists_sources_with_what_they_compute_and_says_which_failed(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert out(capsys, "kernels").splitlines() == [
        f"{cache / 'cpp'}/attention-{'0a' * 10}.cpp FAILED: it could not be built; the next run tries again",
        "    model.py:7",
        "    score * 0.25",
    ]


def test_cache_clear_deletes_kernels_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 kernel, 0.0 MB" in out(capsys, "cache")
    assert main(["cache", "--clear"]) == 0
    assert [path.name for path in cache.iterdir()] == ["mine.txt"]


# --------------------------------------------------------------------------------------------------------------- doctor


@pytest.mark.compiler
def test_doctor_finds_all_well_where_kernels_are_built(capsys: pytest.CaptureFixture[str]) -> None:
    shown = out(capsys, "doctor")
    assert "right: " in shown and "C++ compiler" in shown and "OpenMP" in shown and shown.endswith("All is well.\n")
    assert fuse.__version__ in shown and torch.__version__ in shown


def test_doctor_says_what_is_missing_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / "empty"))
    targets.reset()
    shown = out(capsys, "doctor", status=1)
    assert "no program 'no-such-compiler'" in shown and "apt install g++" in shown and "none could be had" in shown
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path / "file"))
    assert "allowed: a folder" in out(capsys, "doctor", status=1)


# ------------------------------------------------------------------------------------------------------ waiting for nothing


def program() -> str:
    return str(Path(sys.executable).with_name("torch-fuse"))


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["explane"], *([command, "--help"] for command in COMMANDS)])
def test_help_version_and_misspelt_commands_do_not_wait_for_torch_or_rich(words: list[str]) -> None:
    code = "import sys; from fuse.cli import main; import atexit\n"
    code += "atexit.register(lambda: print([m for m in ('torch', 'rich', 'sympy') if m in sys.modules], file=sys.stderr))\n"
    done = subprocess.run([sys.executable, "-c", f"{code}sys.exit(main({words}))"], capture_output=True, text=True)
    assert done.stderr.endswith("[]\n")


@pytest.mark.parametrize("command", [[sys.executable, "-m", "fuse"], [program()]])
def test_it_is_a_program_by_two_names(command: list[str], cache: Path) -> None:
    assert subprocess.run([*command, "--version"], capture_output=True, text=True).stdout == f"torch-fuse {fuse.__version__}\n"
    done = subprocess.run([*command, "cache"], capture_output=True, text=True)
    assert done.returncode == 0 and str(cache) in done.stdout


def test_whoever_reads_may_have_enough(cache: Path) -> None:
    done = subprocess.run(f"{sys.executable} -m fuse kernels | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_every_command_is_a_file() -> None:
    folder = Path(fuse.__file__).parent / "cli"
    assert set(COMMANDS) <= {file.stem for file in folder.glob("*.py")}


def test_without_torch_it_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    code = "import sys; from fuse.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "NoTorch: fuse cannot be loaded: this torch is broken. It needs torch"
    )
