"""What is known about entries that carry no weight: the predicate is separated from the score, and bounded in closed form."""

from __future__ import annotations

import dataclasses

from fuse.ir.spec import AttentionSpec, Mask
from fuse.passes.bounds import bounds, pushed
from fuse.passes.predicate import separate


def recover_mask(spec: AttentionSpec) -> AttentionSpec:
    """The spec with what can be proved about its masked entries; unchanged where there are none."""
    split = separate(spec.score, spec.batch)
    if split is None:
        return spec
    predicate = pushed(split.predicate)
    found = bounds(spec, predicate)
    mask = Mask(predicate, split.visible, found.lower, found.upper, found.residual, split.fill)
    return dataclasses.replace(spec, mask=mask)
