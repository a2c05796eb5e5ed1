"""What holds for all sites of a graph, whatever they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from fuse.report.reasons import Declined, Reason

Choose = Callable[[torch.device], str | None]
"""The name of the target that computes attention of tensors on a device; None where nobody does."""
Leave = Callable[[Node, tuple[bool, ...], str], Reason | None]
"""Why a site is left although it can be fused: from its op, which of its operands want a gradient, and the operator that the
site is a call of, "" where it is written out."""


def leave_none(op: Node, wanted: tuple[bool, ...], written: str) -> None:
    return None


@dataclass(frozen=True)
class Policy:
    """
    choose   see Choose
    leave    see Leave
    refused  why no site of the graph is read; None: they are
    """

    choose: Choose
    leave: Leave = leave_none
    refused: Declined | None = None
