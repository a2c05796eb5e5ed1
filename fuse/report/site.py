"""One attention site of a user's model, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fuse.ir.spec import AttentionSpec
from fuse.report.reasons import Reason


@dataclass(frozen=True)
class Site:
    """What the passes found at one place of the model.

    fused     a generated kernel computes it
    reason    why it was left as it is; None where it is fused
    where     "file.py:line" of the user's source
    module    path of the module in the model, "model.layers.0.self_attn", or ""
    formula   the score in the user's terms
    mask      the predicate that was recovered: "k <= q"; "" where there is none
    sizes     the values of spec.symbols in the call that was compiled; 0 for one that only the data tell
    names     operand number → what the graph calls the tensor
    kernels   target → generated source, filled in when kernels are built
    wanted    for each operand whether training asks for its gradient
    """

    fused: bool
    reason: Reason | None
    where: str
    module: str
    formula: str = ""
    mask: str = ""
    spec: AttentionSpec | None = None
    sizes: tuple[int, ...] = ()
    names: dict[int, str] = field(default_factory=dict)
    kernels: dict[str, Path] = field(default_factory=dict)
    wanted: tuple[bool, ...] = ()
