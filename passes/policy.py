"""What holds for all sites of a graph, whatever they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from fuse.report.reasons import Declined, Reason

Leave = Callable[[Node, tuple[bool, ...], str], Reason | None]
"""Why a site is left although it can be fused: from its op, which of its operands want a gradient, and the operator that the
site is a call of, "" where it is written out."""


def leave_none(op: Node, wanted: tuple[bool, ...], written: str) -> None:
    return None


@dataclass(frozen=True)
class Policy:
    """
    target   who runs what is fused
    leave    see Leave
    refused  why no site of the graph is read; None: they are
    """

    target: str
    leave: Leave = leave_none
    refused: Declined | None = None
