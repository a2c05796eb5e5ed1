"""A model named on the command line: ``module:callable``, ``file.py:callable``, or a transformers model type."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fuse.errors import UnknownModel, UnusableModel, did_you_mean

LENGTH = 256


class ModelCall(NamedTuple):
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def load(name: str, *, layers: int | None = None, attention: str = "eager") -> ModelCall:
    """``layers`` and ``attention`` are for transformers types; memory for their weights is reserved but never touched."""
    return _from_callable(name) if ":" in name else _from_transformers(name, layers, attention)


def on(device: str, call: ModelCall) -> ModelCall:
    """The model and its tensors on ``device``."""
    moved = [_moved(x, device) for x in call.args]
    model = call.model.to(device) if isinstance(call.model, torch.nn.Module) else call.model
    return ModelCall(model, tuple(moved), {name: _moved(x, device) for name, x in call.kwargs.items()})


def _moved(x: Any, device: str) -> Any:
    return x.to(device) if isinstance(x, torch.Tensor) else x


def fill(model: torch.nn.Module) -> None:
    """Small random numbers in the place of whatever the memory of a transformers type held."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)


def _from_callable(name: str) -> ModelCall:
    source, _, attribute = name.rpartition(":")
    try:
        made = getattr(_module(source), attribute)()
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise UnknownModel(name=name, problem=error, hint="") from error
    match made:
        case (model, tuple(args)):
            return ModelCall(model, args, {})
        case (model, dict(kwargs)):
            return ModelCall(model, (), kwargs)
        case (model, tuple(args), dict(kwargs)):
            return ModelCall(model, args, kwargs)
    raise UnusableModel(name=name, got=type(made).__name__)


def _module(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_transformers(name: str, layers: int | None, attention: str) -> ModelCall:
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as known
    except ImportError as error:
        raise UnknownModel(name=name, problem="transformers is not installed", hint="") from error
    if name not in known:
        raise UnknownModel(name=name, problem="transformers has no such model type", hint=did_you_mean(name, known))
    config = AutoConfig.for_model(name)
    if layers is not None:
        _limit_layers(config, layers)
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation=attention).eval()
    inputs = {key: make(config) for key, make in INPUTS.items() if key in inspect.signature(model.forward).parameters}
    return ModelCall(model.to_empty(device="cpu"), (), inputs)


def _tokens(config: Any) -> torch.Tensor:
    return torch.zeros(1, LENGTH, dtype=torch.long)


def _image(config: Any) -> torch.Tensor:
    size = _setting(config, "image_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.zeros(1, _setting(config, "num_channels"), height, width)


def _spectrogram(config: Any) -> torch.Tensor:
    return torch.zeros(1, _setting(config, "num_mel_bins"), 2 * _setting(config, "max_source_positions"))


INPUTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": _tokens, "decoder_input_ids": _tokens, "pixel_values": _image, "input_features": _spectrogram,
}  # fmt: skip


def _parts(config: Any) -> list[Any]:
    """The configuration and those of its parts, such as text and vision."""
    return [config, *(value for key, value in vars(config).items() if key.endswith("_config"))]


def _setting(config: Any, name: str) -> Any:
    for part in _parts(config):
        if hasattr(part, name):
            return getattr(part, name)
    problem = f"its configuration has no {name}, so that its inputs cannot be made"
    raise UnknownModel(name=config.model_type, problem=problem, hint="")


def _limit_layers(config: Any, layers: int) -> None:
    for part in _parts(config):
        for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, layers)
