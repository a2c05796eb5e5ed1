"""The comparison with float64 has teeth: a small mistake in an attention would be seen in every model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models import MODELS, decoders, encoders, pairs  # noqa: F401  (they register the models)
from models.measure import MARGIN, error, exact, outputs, prepared


class Mistaken(TorchFunctionMode):
    """Scores that are too small by half a percent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            args = (args[0] * 0.995, *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_small_mistake_shows_in_the_result(name: str) -> None:
    network, inputs = prepared(*MODELS[name].build("eager"), torch.float32)
    truth = exact(network, inputs)
    with Mistaken():
        mistaken = outputs(network, inputs)
    assert error(mistaken, truth) > 100 * MARGIN * error(outputs(network, inputs), truth)
