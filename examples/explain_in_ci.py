"""A gate for CI: fails where a model has attention that is not fused, and says what would change that.

    python examples/explain_in_ci.py

prints, and ends with status 1 if there is a site that is not fused:

    model.Encoder: 2 attention sites, 2 fused
    model.Pooling: 1 attention site, 0 fused
        explain_in_ci.py:37: the scores, or what is made of them, are also used by the graph's output
        use the weights that the softmax or its dropout gives, or the logsumexp of the scores: fuse gives these too

Nothing is built and nothing runs: a model of billions of parameters is explained in seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fuse


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Pooling(nn.Module):
    """One vector for each text, and how alike the texts are."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alike = x @ x.mT
        return alike.softmax(-1) @ x, alike


MODELS: dict[str, Callable[[], nn.Module]] = {"model.Encoder": encoder, "model.Pooling": Pooling}


def unfused(name: str, model: nn.Module, *inputs: Any) -> int:
    """How many sites of the model are not fused, after saying so; a model without any site counts as one."""
    report = fuse.explain(model, *inputs)
    print(f"{name}: {report.summary}")
    for site in report.sites:
        if site.reason is not None:
            print(f"    {site.where}: {site.reason}\n    {site.reason.unblock}")
    return len(report.sites) - report.fused if report.sites else 1


def main() -> int:
    with torch.no_grad():
        return int(any([unfused(name, make(), torch.randn(2, 128, 64)) for name, make in MODELS.items()]))


if __name__ == "__main__":
    sys.exit(main())
