"""What holds for all sites of a graph, whatever they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fuse.parallel.plan import Across
from fuse.report.reasons import Declined, Reason

Choose = Callable[[torch.device], str | None]
"""The name of the target that computes attention of tensors on a device; None where nobody does."""
Leave = Callable[[Node, tuple[bool, ...], str], Reason | None]
"""Why a site is left although it can be fused: from its op, which of its operands want a gradient, and the operator that the
site is a call of, "" where it is written out."""


def leave_none(op: Node, wanted: tuple[bool, ...], written: str) -> None:
    return None


class Contents:
    """What the tensors hold that a graph reads. This one knows of none."""

    def of(self, node: Node) -> Tensor | None:
        """The tensor that ``node`` is in every call, unless it is said to have changed; None where nothing is known."""
        return None

    def rely(self, node: Node, holds: Callable[[Tensor], bool]) -> bool:
        """Has the graph compiled anew as soon as ``node`` is a tensor of which ``holds`` is not true any more; False where that
        cannot be had.
        """
        return False


@dataclass(frozen=True)
class Policy:
    """
    choose    see Choose
    leave     see Leave
    contents  see Contents
    refused   why no site of the graph is read; None: they are
    across    where the sequence lies, if that is on several ranks
    """

    choose: Choose
    leave: Leave = leave_none
    contents: Contents = Contents()
    refused: Declined | None = None
    across: Across | None = None
