"""What ``fuse::context_attention`` is told beside its spec: who holds the sequence, and where positions are in its operands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache

from fuse.ir import serial

At = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """
    group     its name
    balanced  as of Layout
    way       as of ContextParallel
    queries   (operand, dimension) of the positions of queries, which lie on the rank that needs them
    keys      (operand, dimension) of those of keys, which come from all ranks
    compares  asks first whether all ranks have made the same call
    """

    group: str
    balanced: bool
    way: str
    queries: At
    keys: At
    compares: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @staticmethod
    @cache
    def from_json(text: str) -> Plan:
        data = serial.loads(text)
        at = {name: tuple((operand, dim) for operand, dim in data[name]) for name in ("queries", "keys")}
        return Plan(**(data | at))


@dataclass(frozen=True)
class Across:
    """What passes are told: a plan, to which each site adds its operands. ``trusted``: nobody looks into whether everything but
    attention is computed for each position by itself."""

    plan: Plan
    trusted: bool
