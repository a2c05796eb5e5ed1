"""``options={"context_parallel": …}``: over which ranks a sequence lies, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fuse.errors import InvalidOption, NoRanks
from fuse.parallel.layout import Layout

WAYS = ("auto", "gather", "ring")


@dataclass(frozen=True)
class ContextParallel:
    """The value of ``options={"context_parallel": …}``; a mesh or a group by itself stands for one with nothing else chosen.

    group     a process group of torch.distributed, or a DeviceMesh of one dimension, such as ``mesh["cp"]``
    balanced  how the sequence lies on the ranks: as ``fuse.shard_sequence(…, balanced=…)`` has split it
    way       "gather": all keys and values that a shard's queries see are brought together, and a kernel is called once.
              "ring": they come a rank at a time, while the ones before are computed, and the parts are merged by their
              log-sum-exp. "auto": gather where that takes no more memory than the shard's queries and results do, or where
              parts cannot be merged exactly, else ring
    positionwise  True: the user says that the model computes everything but attention for each position by itself. Else it is
              checked, and what is not known to be so, such as experts that gather their tokens, raises NotAcrossRanks

    Raises InvalidOption for anything else, NoRanks where torch.distributed was not initialised.
    """

    group: Any
    balanced: bool = False
    way: str = "auto"
    positionwise: bool = False

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise InvalidOption(name="context_parallel.way", value=self.way, allowed=", ".join(map(repr, WAYS)), hint="")
        for name in ("balanced", "positionwise"):
            if type(value := getattr(self, name)) is not bool:
                raise InvalidOption(name=f"context_parallel.{name}", value=value, allowed="True, False", hint="")
        process_group(self.group)

    @property
    def group_name(self) -> str:
        name: str = process_group(self.group).group_name
        return name

    @property
    def layout(self) -> Layout:
        return Layout(dist.get_world_size(process_group(self.group)), self.balanced)


def context_parallel(given: Any) -> ContextParallel:
    """``given`` as a user may write it. Raises as ContextParallel."""
    return given if isinstance(given, ContextParallel) else ContextParallel(given)


def process_group(given: Any) -> Any:
    """The group of torch.distributed behind a mesh or a group. Raises as ContextParallel."""
    allowed = "a process group of torch.distributed, a DeviceMesh of one dimension, or fuse.ContextParallel of one"
    if not dist.is_available() or not dist.is_initialized():
        raise NoRanks
    if isinstance(given, dist.ProcessGroup):
        return given
    if isinstance(given, torch.distributed.device_mesh.DeviceMesh):
        if given.ndim == 1:
            return given.get_group()
        hint = f" It has {given.ndim} dimensions: choose one, as in mesh[{(given.mesh_dim_names or ('cp',))[-1]!r}]."
        raise InvalidOption(name="context_parallel", value=given, allowed=allowed, hint=hint)
    raise InvalidOption(name="context_parallel", value=given, allowed=allowed, hint="")
