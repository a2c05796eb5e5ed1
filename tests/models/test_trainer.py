"""Trainer of transformers, told to compile by fuse, learns as it does without."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fuse
from models import HEADS, HIDDEN, LENGTH, VOCABULARY

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

STEPS = 4


def losses(folder: Path, **compile_by: Any) -> list[float]:
    """Of a GPT-2 without dropout, whose numbers are others in a kernel."""
    torch.manual_seed(0)
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=HEADS, **none))
    texts = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCABULARY, (STEPS * 2, LENGTH))]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=STEPS, logging_steps=1, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, **compile_by,
    )  # fmt: skip
    trainer = Trainer(network, arguments, train_dataset=texts)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_takes_fuse_by_its_name_and_learns_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_INNER", "aot_eager")
    eager = losses(tmp_path)
    assert not fuse.report().graphs
    assert losses(tmp_path, torch_compile=True, torch_compile_backend="fuse") == pytest.approx(eager, rel=1e-4)
    (site,) = fuse.report().sites
    assert site.fused and any(site.wanted) and site.runs["backward"].by == "kernel"


def test_the_tutorial_trains_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (Path(__file__).parents[2] / "docs/tutorial.md").read_text().partition("## `generate` and `Trainer`")[2]
    (tmp_path / "code.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    for name, value in {"FUSE_INNER": "eager", "FUSE_TARGET": "reference"}.items():
        monkeypatch.setenv(name, value)
    ran = runpy.run_path("code.py")
    assert ran["tokens"].shape == (1, 57)
    sites = fuse.report().sites
    assert all(site.recovered for site in sites)
    assert {any(site.wanted) for site in sites} == {True, False}
