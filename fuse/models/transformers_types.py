"""A model type of transformers, with inputs that its configuration describes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fuse import contents
from fuse.errors import BuilderFailed, UnknownModel, did_you_mean
from fuse.failure import told
from fuse.models.call import ModelCall, Wanted

LENGTH = 1024  # or what the model has positions for


def load(name: str, wanted: Wanted, weights: bool) -> ModelCall:
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as known
    except ImportError as error:
        problem = "transformers is not installed, which knows model types (pip install transformers)"
        raise UnknownModel(name=name, problem=problem, hint="") from error
    if name not in known:
        raise UnknownModel(name=name, problem="transformers has no such model type", hint=_hint(name, known))
    try:
        config = AutoConfig.for_model(name)
        if wanted.layers is not None:
            _limit_layers(config, wanted.layers)
        options = {"attn_implementation": wanted.attention, "dtype": wanted.dtype}
        with torch.device("cpu" if weights else "meta"):
            model = AutoModel.from_config(config, **{k: v for k, v in options.items() if v is not None}).eval()
    except Exception as error:
        raise BuilderFailed(name=f"transformers, asked for {name!r},", error=told(error)) from error
    parameters = inspect.signature(model.forward).parameters
    inputs = {key: make(config, wanted) for key, make in INPUTS.items() if key in parameters}
    inputs = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    if wanted.padding and "attention_mask" in parameters and "input_ids" in parameters:
        inputs["attention_mask"] = _attention_mask(inputs["input_ids"], wanted.padding)
    if not weights:
        model.to_empty(device="cpu")
        contents.unset(model.buffers())
    return ModelCall(model, (), inputs)


def _hint(name: str, known: Any) -> str:
    """What else may have been meant: a file in this folder, or a type that is called much the same."""
    return f" Did you mean {name}.py:build?" if Path(f"{name}.py").exists() else did_you_mean(name, known)


def _tokens(config: Any, wanted: Wanted) -> torch.Tensor:
    positions = _found(config, "max_position_embeddings")
    length = wanted.length or (min(LENGTH, positions) if isinstance(positions, int) and positions > 0 else LENGTH)
    batch = wanted.batch or (2 if wanted.padding else 1)
    return torch.randint(_setting(config, "vocab_size"), (batch, length))


def _attention_mask(tokens: torch.Tensor, padding: str) -> torch.Tensor:
    """Texts of all positions down to half as many."""
    batch, length = tokens.shape
    lengths = torch.linspace(length, length // 2, batch).long()[:, None]
    real = (torch.arange(length) < lengths).long()
    return real.flip(1) if padding == "left" else real


def _image(config: Any, wanted: Wanted) -> torch.Tensor:
    size = _setting(config, "image_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(wanted.batch or 1, _setting(config, "num_channels"), height, width)


def _spectrogram(config: Any, wanted: Wanted) -> torch.Tensor:
    return torch.randn(wanted.batch or 1, _setting(config, "num_mel_bins"), 2 * _setting(config, "max_source_positions"))


INPUTS: dict[str, Callable[[Any, Wanted], torch.Tensor]] = {
    "input_ids": _tokens, "decoder_input_ids": _tokens, "pixel_values": _image, "input_features": _spectrogram,
}  # fmt: skip


def _parts(config: Any) -> list[Any]:
    """The configuration and those of its parts, such as text and vision."""
    return [config, *(value for key, value in vars(config).items() if key.endswith("_config"))]


def _found(config: Any, name: str) -> Any:
    return next((getattr(part, name) for part in _parts(config) if hasattr(part, name)), None)


def _setting(config: Any, name: str) -> Any:
    if (value := _found(config, name)) is None:
        problem = f"its configuration has no {name}, so that its inputs cannot be made: write a function that returns both"
        raise UnknownModel(name=config.model_type, problem=problem, hint="")
    return value


def _limit_layers(config: Any, layers: int) -> None:
    for part in _parts(config):
        for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, layers)
